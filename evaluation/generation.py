"""Generate the model's answers to conversations, in batches."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from ..data_prep.messages import shows_something
from ..media_empathic import MediaError
from ..sampling import end_tokens, plain_decoding
from ..thoughts import WrittenDecoder


class Answer(NamedTuple):
    """
    An answer.

    Attributes:
        text: the text without thoughts; may be empty.
        tokens: its length in tokens, including thoughts.
        finished: whether it ended before the maximum length.
        thought: the thoughts of a reasoning model.
        note: why there is no text, if the model wrote only a thought.
    """

    text: str
    tokens: int
    finished: bool
    thought: str = ""
    note: str | None = None


@torch.no_grad()
def answer(model, processor, prepared: list[dict], max_new_tokens: int = 64, **generate_kwargs) -> list[Answer]:
    """
    Generate the answers to a batch of conversations, in order.

    Args:
        model, processor: the model, or a PEFT model around it, and its `EmpathicProcessor`.
        prepared: the output of `processor.prepare` for each conversation.
        max_new_tokens: maximum number of tokens in an answer.
        generate_kwargs: arguments of `model.generate`; by default `plain_decoding`.
    """
    model.eval()
    inputs = processor.pad(prepared).to(model.device)
    output = model.generate(**inputs, **plain_decoding(max_new_tokens=max_new_tokens, **generate_kwargs))
    written = output[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor([*end_tokens(model.generation_config)], dtype=torch.long, device=written.device)
    answers, decode = [], WrittenDecoder(processor.tokenizer)
    for row in written:
        stops = torch.isin(row, ends).nonzero().flatten().tolist()
        read = decode(row.tolist())
        length = stops[0] if stops else len(row)
        answers.append(Answer(read.reply, length, bool(stops), read.thought, read.note()))
    return answers


def generate_texts(
    model,
    processor,
    conversations: list[list[dict]],
    task: str = "dialogue",
    history: str = "memory",
    max_new_tokens: int = 64,
    batch_size: int = 32,
    description: str | None = None,
    **generate_kwargs,
) -> list[str]:
    """
    Generate the text of the answer to each conversation, in order.

    Args:
        model, processor: the model and its `EmpathicProcessor`.
        conversations: message lists.
        task, history: as in `EmpathicProcessor.apply_chat_template`.
        max_new_tokens, batch_size: maximum number of tokens in an answer, and number of conversations per batch.
        description: label of the progress bar; None for no bar.
        generate_kwargs: arguments of `model.generate`; by default `plain_decoding`.
    """
    texts = []
    for start in tqdm(range(0, len(conversations), batch_size), desc=description, disable=description is None):
        batch = conversations[start : start + batch_size]
        prepared = [processor.prepare(messages, task, history) for messages in batch]
        texts += [found.text for found in answer(model, processor, prepared, max_new_tokens, **generate_kwargs)]
    return texts


def prepare_readable(processor, messages: list[dict], **options) -> tuple[dict | None, str | None]:
    """
    Run `processor.prepare` on a conversation, without the clips that cannot be read.

    Args:
        messages: a conversation whose last message holds the clips.
        options: arguments of `EmpathicProcessor.prepare`.

    Returns:
        The prepared inputs, or None if there is nothing to answer; and a note on what was left out and why, or None.
    """
    if not shows_something(messages[-1], "dialogue"):
        return None, "The last turn has nothing to hear, see or read, so there is no reply."
    try:
        return processor.prepare(messages, **options), None
    except MediaError:
        pass  # the loop below finds the clip
    *earlier, last = messages
    kept, notes = [], []
    for item in last["content"]:
        try:
            if item["type"] == "audio":
                processor.sound(item)
            elif item["type"] == "video":
                processor.frames(item)
            kept.append(item)
        except MediaError as error:
            notes.append(f"{item['type']} left out: {error}")
    note = " ".join(notes)
    if not kept:
        return None, f"{note} Nothing is left, so there is no reply."
    return processor.prepare([*earlier, {**last, "content": kept}], **options), note

"""Answers of the model to many conversations, in batches."""

from typing import NamedTuple

import torch
from tqdm import tqdm

from empathic.media_empathic import MediaError
from empathic.trainers.samples import shows_something


class Answer(NamedTuple):
    """The text, which may be empty, its length in tokens, and whether it came to its end before the greatest length."""

    text: str
    tokens: int
    finished: bool


@torch.no_grad()
def answer(model, processor, prepared: list[dict], max_new_tokens: int = 64, **generate_kwargs) -> list[Answer]:
    """
    The model's answers to one batch, in order.

    Args:
        model, processor: the model, or a PEFT model of one, and its `EmpathicProcessor`.
        prepared: what `processor.prepare` gave for each conversation.
        max_new_tokens: tokens of an answer at most.
        generate_kwargs: of `model.generate`; greedy by default.
    """
    model.eval()
    inputs = processor.pad(prepared).to(model.device)
    output = model.generate(**inputs, **{"do_sample": False, "max_new_tokens": max_new_tokens, **generate_kwargs})
    written = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = torch.tensor(ends, dtype=torch.long, device=written.device)
    answers = []
    for text, row in zip(processor.batch_decode(written, skip_special_tokens=True), written, strict=True):
        stops = torch.isin(row, ends).nonzero().flatten().tolist()
        answers.append(Answer(text.strip(), stops[0] if stops else len(row), bool(stops)))
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
    The model's answer to each conversation, in order.

    Args:
        model, processor: the model and its `EmpathicProcessor`.
        conversations: message lists.
        task, history: as in `EmpathicProcessor.apply_chat_template`.
        max_new_tokens, batch_size: tokens of an answer at most, and conversations generated at once.
        description: of the progress bar; none without it.
        generate_kwargs: of `model.generate`; greedy by default.
    """
    texts = []
    for start in tqdm(range(0, len(conversations), batch_size), desc=description, disable=description is None):
        batch = conversations[start : start + batch_size]
        prepared = [processor.prepare(messages, task, history) for messages in batch]
        texts += [found.text for found in answer(model, processor, prepared, max_new_tokens, **generate_kwargs)]
    return texts


def prepare_readable(processor, messages: list[dict], **options) -> tuple[dict | None, str | None]:
    """
    A conversation as `processor.prepare` gives it, without the clips that cannot be read.

    Args:
        messages: a conversation whose last message holds the clips.
        options: of `EmpathicProcessor.prepare`.

    Returns:
        what was prepared, None where there is nothing to answer; and what was left out and why, None if nothing was.
    """
    if not shows_something(messages[-1], "dialogue"):
        return None, "The last turn has nothing to hear, see or read, so there is no reply."
    try:
        return processor.prepare(messages, **options), None
    except MediaError:
        pass  # which clip it is, is found out below
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
        return None, f"{note} Nothing else is there, so there is no reply."
    return processor.prepare([*earlier, {**last, "content": kept}], **options), note

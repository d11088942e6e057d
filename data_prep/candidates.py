"""Replies to a sentence as if it had been said with each emotion, and who writes them (paper's Sec. 3.3, Table 7).

A generator is any object with

- `prompt(messages, emotion)`: the prompt of a conversation and an emotion, a dict that holds `input_ids`; it raises
  ValueError, with the reason, for a conversation that cannot be answered;
- `replies(prompts, seeds)`: a `Reply` for each prompt, in order. A reply depends on its prompt and its seed, a string,
  and not on the prompts beside it, but for roundings.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging

from empathic.configuration_empathic import EMOTIONS
from empathic.sampling import Sampling, SeededSampler

logger = logging.get_logger(__name__)

HISTORIES = ("memory", "text", "none")
# The words of chat_templates/counter.jinja, for models that have a template of their own.
INSTRUCTION = "Reply to the sentence, which was said with the given feeling. Give only the reply."
SLOTS = "feeling:\n{emotion}\nsentence:\n{sentence}"
# For a model that has no chat template: a transcript, in which the first line is the reply.
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)
# A text of the conversation is kept out of the template and of the control tokens behind a marker of private-use
# characters, as in the processor.
_MARKER = re.compile("\ue000(\\d+)\ue001")


class Reply(NamedTuple):
    """The text, which may be empty, and whether it came to its end before the greatest length."""

    text: str
    finished: bool


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """The model without its adapters, be it a `PeftModel` or a model with adapters of its own; then as it was."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            kinds = (BaseTunerLayer, ModulesToSaveWrapper)
            layers = [layer for layer in model.modules() if isinstance(layer, kinds) and not layer.disable_adapters]
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
    finally:
        for parameter, needed in trained:  # switching adapters off and on changes these
            parameter.requires_grad_(needed)


def message_text(message: dict) -> str:
    """The text of a message, its content a string or a list of items."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(item["text"] for item in content or [] if item.get("type") == "text" and item.get("text"))


def _conversation(messages: list[dict], emotion: str, history: str) -> list[dict]:
    """The messages that a prompt shows. ValueError if they cannot be answered."""
    if emotion not in EMOTIONS:
        raise ValueError(f"The emotion {emotion!r} is not one of {', '.join(EMOTIONS)}.")
    # A system message of the dialogue would take the place of the task's own instruction.
    kept = [message for message in messages if message.get("role") != "system"]
    if not kept or kept[-1].get("role") != "user":
        raise ValueError("the last message is not the user's, and a reply answers the user")
    if not message_text(kept[-1]).strip():
        raise ValueError("the last message has no text, and a counter-emotional reply is an answer to the text")
    return kept[-1:] if history == "none" else kept


def _check_length(prompt: int, new: int, config) -> None:
    longest = getattr(config, "max_position_embeddings", None)  # not every architecture has one
    if longest is not None and prompt + new > longest:
        raise ValueError(
            f"the prompt has {prompt} tokens; with {new} of the reply that is more than the {longest} that the model "
            "reads. A smaller max_new_tokens or history may help"
        )


def _write(model, tokenizer, prompts: list[dict], seeds, sampling, batch_size, collate: Callable) -> list[Reply]:
    """
    A reply for each prompt. Those of like length share a batch, the longest first: what does not fit into memory fails
    at once. `collate` makes model inputs of a list of prompts.
    """
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]), reverse=True)
    replies: list[Reply] = [Reply("", False)] * len(prompts)
    options = {"max_new_tokens": sampling.max_new_tokens, "do_sample": False}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows])
        if sampling.do_sample:
            sampler = SeededSampler([seeds[i] for i in rows], **sampling.warping(config))
            options["logits_processor"] = [sampler]
        output = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for i, text, ids in zip(rows, texts, output.tolist(), strict=True):
            replies[i] = Reply(text.strip(), not set(ends).isdisjoint(ids))
    return replies


class EmpathicGenerator:
    """
    The model that will be trained writes its own counter-emotional replies, its adapters off (Sec. 3.3).

    The prompt is text only: clips in the messages are not looked at, a system message is left out.

    Args:
        model: an `EmpathicForConditionalGeneration`, with or without adapters, or a `PeftModel` of one.
        processor: its `EmpathicProcessor`.
        history: `memory` or `text`, as for the processor, or `none`: the last sentence alone.
        use_adapter: writes with the model's adapters.
        sampling: a `Sampling`.
        batch_size: replies written at once.
    """

    def __init__(
        self,
        model,
        processor,
        history: str = "memory",
        use_adapter: bool = False,
        sampling: Sampling | None = None,
        batch_size: int = 32,
    ):
        if history not in HISTORIES:
            raise ValueError(f"The history is {history!r}; it is one of {', '.join(HISTORIES)}.")
        self.model, self.processor, self.history, self.use_adapter = model, processor, history, use_adapter
        self.sampling, self.batch_size = sampling or Sampling(), batch_size
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model

    def prompt(self, messages: list[dict], emotion: str) -> dict:
        """What `processor.prepare` gives: `input_ids`, `memory_input_ids`, no media."""
        conversation = _conversation(messages, emotion, self.history)
        history = "text" if self.history == "text" else "memory"
        prompt = self.processor.prepare(conversation, "counter", history, emotion=emotion)
        _check_length(len(prompt["input_ids"]), self.sampling.max_new_tokens, self.base.config.text_config)
        return prompt

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[Reply]:
        """See the module. Each history is encoded once, however many emotions answer it."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), nullcontext() if self.use_adapter else adapters_off(self.model):
                memories = self._memories(prompts)

                def collate(rows: list[dict]) -> dict:
                    batch = self.processor.pad([{**row, "memory_input_ids": []} for row in rows])
                    found = [memories.get(tuple(row["memory_input_ids"])) for row in rows]
                    if any(memory is not None for memory in found):
                        batch["memory_embeds"] = _pad_memories(found)
                    return batch.to(self.base.device)

                tokenizer = self.processor.tokenizer
                return _write(self.base, tokenizer, prompts, seeds, self.sampling, self.batch_size, collate)
        finally:
            self.model.train(was_training)

    def _memories(self, prompts: list[dict]) -> dict[tuple[int, ...], torch.Tensor]:
        """The vectors (utterances, width) of each distinct history."""
        distinct = dict.fromkeys(tuple(prompt["memory_input_ids"]) for prompt in prompts)
        order = sorted((ids for ids in distinct if ids), key=len, reverse=True)
        found = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.processor.pad(
                [{"input_ids": [0], "memory_input_ids": list(ids), "video": None, "audio": None} for ids in rows]
            ).to(self.base.device)
            vectors = self.base.get_memory_features(batch["memory_input_ids"], batch["memory_attention_mask"])
            counts = [ids.count(self.processor.mem_token_id) for ids in rows]
            found.update(zip(rows, vectors.split(counts), strict=True))
        return found


def _pad_memories(memories: list[torch.Tensor | None]) -> torch.Tensor:
    """Vectors (utterances, width) of each row, or None -> (rows, most utterances, width), right-padded with zeros."""
    width = next(memory for memory in memories if memory is not None)
    rows = [width[:0] if memory is None else memory for memory in memories]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class _ChatPrompts:
    """
    The counter task in the words of a text model's own chat template, as token ids.

    Text of the conversation can never write a control token. Where the template refuses a system message, or turns that
    do not alternate, everything stands in one user message; where there is none, a transcript is written.

    Args:
        tokenizer: the text model's.
        history: `text` or `none`.
    """

    def __init__(self, tokenizer, history: str):
        if history not in ("text", "none"):
            raise ValueError(f"The history is {history!r}; a text model gets it as `text`, or `none`.")
        self.tokenizer, self.history = tokenizer, history
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(
            tokenizer.all_special_tokens
        )
        tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.is_transcript = tokenizer.chat_template is None
        if self.is_transcript:
            logger.warning("The generator has no chat template: it is asked to continue a transcript.")
        self._in_turns = True
        probe = [{"role": role, "content": "hello"} for role in ("assistant", "user", "user")]
        try:
            self.ids(probe, EMOTIONS[0])
        except TemplateError:
            self._in_turns = False
            self.ids(probe, EMOTIONS[0])

    def ids(self, messages: list[dict], emotion: str) -> list[int]:
        """The prompt's token ids."""
        texts: list[str] = []

        def mark(text: str) -> str:
            texts.append(text)
            return f"\ue000{len(texts) - 1}\ue001"

        *earlier, last = _conversation(messages, emotion, self.history)
        lines = [
            (m["role"], mark(f"{m['name']}: {message_text(m)}" if m.get("name") else message_text(m))) for m in earlier
        ]
        slots = SLOTS.format(emotion=emotion, sentence=mark(message_text(last)))
        if self._in_turns:
            turns = [("system", INSTRUCTION), *lines, ("user", slots)]
        else:
            turns = [("user", "\n".join([INSTRUCTION, *(line for _, line in lines), slots]))]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            chat_template=TRANSCRIPT if self.is_transcript else None,
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,  # for the templates that know it
        )
        ids: list[int] = []
        pieces = _MARKER.split(rendered)
        if [int(piece) for piece in pieces[1::2]] != list(range(len(texts))):
            raise ValueError("the generator's chat template leaves out a part of the conversation")
        for place, piece in enumerate(pieces):
            ids += self._plain(texts[int(piece)]) if place % 2 else self._encode(piece)
        return ids

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _plain(self, text: str) -> list[int]:
        """A control token's spelling is cut after its first character, and the pieces are tokenized apart."""
        ids, start = [], 0
        while (match := self._control.search(text, start)) is not None:
            ids += self._encode(text[start : match.start() + 1])
            start = match.start() + 1
        return ids + self._encode(text[start:])

    def reply(self, text: str, finished: bool) -> Reply:
        """What the model wrote, without what a transcript goes on with."""
        text = text.strip()
        if self.is_transcript and "\n" in text:
            return Reply(text.split("\n")[0].strip(), True)
        return Reply(text, finished)


class CausalGenerator:
    """
    Any causal language model writes the replies, with its own tokenizer and chat template, the history as text.

    The paper advises against another model than the one that is trained: its replies are too divergent (Sec. 3.3).

    Args:
        name: Hub id or folder.
        history: `text`, or `none`: the last sentence alone.
        sampling: a `Sampling`.
        batch_size: replies written at once.
        device, dtype: where and in what precision; `auto` is the checkpoint's own.
    """

    def __init__(
        self,
        name: str,
        history: str = "text",
        sampling: Sampling | None = None,
        batch_size: int = 32,
        device: str = "cpu",
        dtype: str = "auto",
    ):
        self.sampling, self.batch_size = sampling or Sampling(), batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
        self.prompts = _ChatPrompts(self.tokenizer, history)

    def prompt(self, messages: list[dict], emotion: str) -> dict:
        """`input_ids` alone."""
        ids = self.prompts.ids(messages, emotion)
        _check_length(len(ids), self.sampling.max_new_tokens, self.model.config)
        return {"input_ids": ids}

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[Reply]:
        """See the module."""
        with torch.inference_mode():
            written = _write(self.model, self.tokenizer, prompts, seeds, self.sampling, self.batch_size, self._collate)
        return [self.prompts.reply(*reply) for reply in written]

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (rows, longest), left-padded; any token may stand under a zero mask."""
        ids = [torch.tensor(row["input_ids"][::-1]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._pad_id()).flip(1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).flip(1)
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _pad_id(self) -> int:
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)


class VllmGenerator:
    """
    As `CausalGenerator`, by vLLM, which divides the work over time and GPUs by itself (extra `vllm`).

    Args:
        name, history, sampling, dtype: as in `CausalGenerator`.
        tensor_parallel_size: GPUs that share the model.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(
        self,
        name: str,
        history: str = "text",
        sampling: Sampling | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
    ):
        try:
            import vllm
        except ImportError as error:
            raise ImportError(
                "The backend `vllm` needs vLLM, which is not installed: pip install 'empathic[vllm]', or leave out "
                "--backend vllm."
            ) from error
        self.sampling = sampling or Sampling()
        self.prompts = _ChatPrompts(AutoTokenizer.from_pretrained(name), history)
        self.config = AutoConfig.from_pretrained(name)
        self.model = vllm.LLM(model=name, dtype=dtype, tensor_parallel_size=tensor_parallel_size)
        try:
            generation = GenerationConfig.from_pretrained(name)
        except OSError:  # the checkpoint has none
            generation = GenerationConfig.from_model_config(self.config)
        chosen = self.sampling.warping(generation) if self.sampling.do_sample else {"temperature": 0.0}
        if generation.repetition_penalty is not None:
            chosen["repetition_penalty"] = generation.repetition_penalty
        self._params: Callable = lambda seed: vllm.SamplingParams(
            max_tokens=self.sampling.max_new_tokens, seed=seed, **chosen
        )

    def prompt(self, messages: list[dict], emotion: str) -> dict:
        """`input_ids` alone."""
        ids = self.prompts.ids(messages, emotion)
        _check_length(len(ids), self.sampling.max_new_tokens, self.config)
        return {"input_ids": ids}

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[Reply]:
        """See the module."""
        if not prompts:
            return []
        numbers = [int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1 for seed in seeds]
        outputs = self.model.generate(
            [{"prompt_token_ids": prompt["input_ids"]} for prompt in prompts],
            sampling_params=[self._params(number) for number in numbers],
            use_tqdm=False,
        )
        best = [output.outputs[0] for output in outputs]
        return [self.prompts.reply(output.text, output.finish_reason == "stop") for output in best]

"""Generators, which reply to a sentence as if it had been said with a given emotion (paper's Sec. 3.3, Table 7).

A generator is any object with

- `prompt(messages, emotion)`: the prompt for a conversation and an emotion, a dict with `input_ids`; it raises
  ValueError, with the reason, for a conversation that cannot be answered;
- `replies(prompts, seeds)`: a `Reply` for each prompt, in order. A reply depends only on its prompt and its seed, a
  string, and not on the other prompts, except for rounding errors.
"""

import hashlib
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

from ...configuration_empathic import EMOTIONS
from ...processing_empathic import UntrustedTexts, control_pattern, encode_untrusted
from ...sampling import Sampling, SeededSampler, plain_decoding
from ...thoughts import Written, WrittenDecoder, ends_in_thought, read_written
from ..messages import message_text

logger = logging.get_logger(__name__)

HISTORIES = ("memory", "text", "none")
# The wording of chat_templates/counter.jinja, for models with their own chat template.
INSTRUCTION = "Reply to the sentence, which was said with the given feeling. Give only the reply."
SLOTS = "feeling:\n{emotion}\nsentence:\n{sentence}"
# For a model without a chat template: a transcript; the first line that the model writes is the reply.
TRANSCRIPT = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
)


class CounterReply(NamedTuple):
    """A generated reply: its text, which may be empty, and whether it ended before the maximum length."""

    text: str
    finished: bool


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """Disable the adapters of a `PeftModel`, or of a model with injected adapters, within the context."""
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
        for parameter, needed in trained:  # disabling and enabling adapters changes requires_grad
            parameter.requires_grad_(needed)


def _conversation(messages: list[dict], emotion: str, history: str) -> list[dict]:
    """The messages that the prompt contains. ValueError if they cannot be answered."""
    if emotion not in EMOTIONS:
        raise ValueError(f"The emotion {emotion!r} is not one of {', '.join(EMOTIONS)}.")
    # A system message of the dialogue would replace the instruction of the task.
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
            f"the prompt has {prompt} tokens; with {new} tokens for the reply this exceeds the model's limit of "
            f"{longest}. Reduce max_new_tokens or the history"
        )


def _write(
    model, tokenizer, prompts: list[dict], seeds, sampling, batch_size, collate: Callable, read: Callable = read_written
) -> list[CounterReply]:
    """
    Generate a reply for each prompt. Prompts of similar length share a batch, the longest first, so that a batch that
    does not fit into memory fails at once. `collate` makes model inputs of a list of prompts, and `read` separates the
    reply from the thoughts in the text that the model wrote.
    """
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["input_ids"]), reverse=True)
    replies: list[CounterReply] = [CounterReply("", False)] * len(prompts)
    options, decode = plain_decoding(max_new_tokens=sampling.max_new_tokens), WrittenDecoder(tokenizer)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([prompts[i] for i in rows])
        if sampling.do_sample:
            sampler = SeededSampler([seeds[i] for i in rows], **sampling.warping(config))
            options["logits_processor"] = [sampler]
        output = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        for i, ids in zip(rows, output.tolist(), strict=True):
            written = read(decode.text(ids))
            replies[i] = CounterReply(written.reply, not set(ends).isdisjoint(ids))
    return replies


class EmpathicGenerator:
    """
    Generate counter-emotional replies with the model that will be trained, with its adapters disabled (Sec. 3.3).

    The prompt is text only: clips and system messages are omitted.

    Args:
        model: an `EmpathicForConditionalGeneration`, with or without adapters, or a `PeftModel` that wraps it.
        processor: the model's `EmpathicProcessor`.
        history: `memory` or `text`, as for the processor, or `none` to use only the last sentence.
        use_adapter: whether to enable the model's adapters.
        sampling: sampling options.
        batch_size: replies per batch.
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
            raise ValueError(f"The history is {history!r}; choose one of {', '.join(HISTORIES)}.")
        self.model, self.processor, self.history, self.use_adapter = model, processor, history, use_adapter
        self.sampling, self.batch_size = sampling or Sampling(), batch_size
        self.base = model.get_base_model() if isinstance(model, PeftModel) else model

    def prompt(self, messages: list[dict], emotion: str) -> dict:
        """The output of `processor.prepare`: `input_ids` and `memory_input_ids`, without media."""
        conversation = _conversation(messages, emotion, self.history)
        history = "text" if self.history == "text" else "memory"
        prompt = self.processor.prepare(conversation, "counter", history, emotion=emotion)
        _check_length(len(prompt["input_ids"]), self.sampling.max_new_tokens, self.base.config.text_config)
        return prompt

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[CounterReply]:
        """Generate a `Reply` for each prompt (see the module). Each history is encoded once for all emotions."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), nullcontext() if self.use_adapter else adapters_off(self.model):
                memories = self._memories(prompts)

                def collate(rows: list[dict]) -> dict:
                    batch = self.processor.pad([{**row, "memory_input_ids": []} for row in rows])
                    found = [memories.get(tuple(row["memory_input_ids"])) for row in rows]
                    if any(memory is not None for memory in found):
                        batch["memory_vectors"] = _pad_memories(found)
                    return batch.to(self.base.device)

                tokenizer = self.processor.tokenizer
                return _write(self.base, tokenizer, prompts, seeds, self.sampling, self.batch_size, collate)
        finally:
            self.model.train(was_training)

    def _memories(self, prompts: list[dict]) -> dict[tuple[int, ...], torch.Tensor]:
        """The memory vectors (utterances, width) of each distinct history, by its token ids."""
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
    """Pad memory vectors (utterances, width) or None per row to (rows, max utterances, width), zeros on the right."""
    width = next(memory for memory in memories if memory is not None)
    rows = [width[:0] if memory is None else memory for memory in memories]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class _ChatPrompts:
    """
    Render the prompts of the counter task with a text model's own chat template, as token ids.

    Text of the conversation never becomes a control token. If the template rejects a system message or turns that do
    not alternate, the whole prompt is one user message; if there is no template, the prompt is a transcript.

    Args:
        tokenizer: tokenizer of the text model.
        history: `text` or `none`.
    """

    def __init__(self, tokenizer, history: str):
        if history not in ("text", "none"):
            raise ValueError(f"The history is {history!r}; choose `text` or `none` for a text model.")
        self.tokenizer, self.history = tokenizer, history
        self._control = control_pattern(tokenizer)
        self.is_transcript = tokenizer.chat_template is None
        if self.is_transcript:
            logger.warning("The generator has no chat template; its prompt is a transcript to continue.")
        self._in_turns = True
        probe = [{"role": role, "content": "hello"} for role in ("assistant", "user", "user")]
        try:
            self.ids(probe, EMOTIONS[0])
        except TemplateError:
            self._in_turns = False
            self.ids(probe, EMOTIONS[0])

    def ids(self, messages: list[dict], emotion: str) -> list[int]:
        """The token ids of the prompt."""
        untrusted = UntrustedTexts()
        mark = untrusted.mark
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
            enable_thinking=False,  # for templates that support it
        )
        if not untrusted.has_all(rendered):
            raise ValueError("the generator's chat template omits a part of the conversation")
        pieces = list(untrusted.split(rendered))
        self.starts_in_thought = not pieces[-1][0] and ends_in_thought(pieces[-1][1])
        ids: list[int] = []
        for is_untrusted, piece in pieces:
            if is_untrusted:
                ids += encode_untrusted(self.tokenizer, piece, self._control)
            else:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def read(self, text: str) -> Written:
        """The reply and the thoughts in the generated text."""
        return read_written(text, self.starts_in_thought)

    def reply(self, text: str, finished: bool) -> CounterReply:
        """The reply, without the lines that continue a transcript."""
        text = text.strip()
        if self.is_transcript and "\n" in text:
            return CounterReply(text.split("\n")[0].strip(), True)
        return CounterReply(text, finished)


class CausalGenerator:
    """
    Generate the replies with any causal language model, its own tokenizer and chat template; the history is text.

    The paper advises against a model other than the one to be trained, because its replies diverge too much (Sec. 3.3).

    Args:
        name: Hub id or folder.
        history: `text`, or `none` to use only the last sentence.
        sampling: sampling options.
        batch_size: replies per batch.
        device: device of the model.
        dtype: dtype of the model; `auto` is the dtype of the checkpoint.
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
        """A dict with `input_ids` only."""
        ids = self.prompts.ids(messages, emotion)
        _check_length(len(ids), self.sampling.max_new_tokens, self.model.config)
        return {"input_ids": ids}

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[CounterReply]:
        """Generate a `Reply` for each prompt (see the module)."""
        with torch.inference_mode():
            options = self.sampling, self.batch_size, self._collate, self.prompts.read
            written = _write(self.model, self.tokenizer, prompts, seeds, *options)
        return [self.prompts.reply(*reply) for reply in written]

    def _collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Left-padded `input_ids` and `attention_mask`, both (rows, longest); any token id can serve as padding."""
        ids = [torch.tensor(row["input_ids"][::-1]) for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._pad_id()).flip(1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).flip(1)
        return {"input_ids": padded.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _pad_id(self) -> int:
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)


class VllmGenerator:
    """
    `CausalGenerator` with vLLM, which does its own batching and distribution over GPUs (extra `vllm`).

    Args:
        name, history, sampling, dtype: as in `CausalGenerator`.
        tensor_parallel_size: GPUs that share the model.

    Raises:
        ImportError: if vLLM is not installed.
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
                "The backend `vllm` needs vLLM, which is not installed. Run pip install 'empathic[vllm]', or omit "
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
        # vLLM uses no penalty of the generation config with parameters of our own, as in `plain_decoding`.
        self._decode = WrittenDecoder(self.prompts.tokenizer)
        self._params: Callable = lambda seed: vllm.SamplingParams(
            max_tokens=self.sampling.max_new_tokens, seed=seed, **chosen
        )

    def prompt(self, messages: list[dict], emotion: str) -> dict:
        """A dict with `input_ids` only."""
        ids = self.prompts.ids(messages, emotion)
        _check_length(len(ids), self.sampling.max_new_tokens, self.config)
        return {"input_ids": ids}

    def replies(self, prompts: list[dict], seeds: Sequence[str]) -> list[CounterReply]:
        """Generate a `Reply` for each prompt (see the module)."""
        if not prompts:
            return []
        numbers = [int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") >> 1 for seed in seeds]
        outputs = self.model.generate(
            [{"prompt_token_ids": prompt["input_ids"]} for prompt in prompts],
            sampling_params=[self._params(number) for number in numbers],
            use_tqdm=False,
        )
        best = [output.outputs[0] for output in outputs]
        texts = [self._decode.text(output.token_ids) for output in best]
        return [
            self.prompts.reply(self.prompts.read(text).reply, output.finish_reason == "stop")
            for text, output in zip(texts, best, strict=True)
        ]

"""
Baselines: the models that ours is compared with, run by transformers (paper's Sec. 4.3, Table 1):

    qwen=chat:Qwen/Qwen2.5-7B-Instruct                                the history as text
    qwen_ft=chat:Qwen/Qwen2.5-7B-Instruct,adapter=runs/baselines/chat    fine-tuned by `baselines/train.py`
    qwen_audio=audio:Qwen/Qwen2-Audio-7B-Instruct                     also hears the last turn
    llava=video:llava-hf/LLaVA-NeXT-Video-7B-hf                       also sees it

`baselines/prompts.py` makes their inputs.
"""

from functools import cached_property

import torch
from peft import PeftModel

from ...baselines.models import load_baseline, load_processor, longest_input
from ...baselines.prompts import BASELINE_KINDS, FRAMES_AS, SYSTEM_PROMPT, BaselinePrompts
from ...data_prep.counter.build import identity_of
from ...files import fingerprint
from ...sampling import SeededSampler, plain_decoding
from ...thoughts import WrittenDecoder
from .base import Common, Reply

# Options of a spec in addition to the common options: name -> parser, for `open.open_system`.
OPTIONS = {"adapter": str, "num_frames": int, "frames_as": str}


class BaselineSystem:
    """
    A chat, audio or video model of transformers, greedy unless a temperature is given.

    Args:
        name: name of the system.
        kind: `chat`, `audio` or `video`.
        target: Hub id or folder.
        common: see `Common`.
        adapter: folder or Hub id of a PEFT adapter for the model.
        num_frames: number of frames per clip, evenly spaced (8 as for our model).
        frames_as: `video` or `images`; None for a video if the model's processor has a video processor.

    Raises:
        ValueError: if a number or a choice is out of range.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        target: str,
        common: Common,
        adapter: str | None = None,
        num_frames: int = 8,
        frames_as: str | None = None,
    ):
        if kind not in BASELINE_KINDS:
            raise ValueError(f"{name}: the kind is {kind!r}; it is one of {', '.join(BASELINE_KINDS)}.")
        if num_frames < 1:
            raise ValueError(f"{name}: num_frames is {num_frames}; it must be at least 1.")
        if frames_as not in (None, *FRAMES_AS):
            raise ValueError(f"{name}: frames_as is {frames_as!r}; it is one of {', '.join(FRAMES_AS)}.")
        self.name, self.kind, self.target, self.common, self.adapter = name, kind, target, common, adapter
        self.num_frames, self.frames_as, self.batch_size = num_frames, frames_as, common.batch_size
        self.clip_kinds = () if kind == "chat" else (kind,)

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the weights, as in `ours.LazyCheckpoint`."""
        parts = [identity_of(self.target)]
        if self.adapter is not None:
            parts.append(identity_of(self.adapter, "adapter_config.json"))
        return fingerprint(parts)[:16]

    @property
    def settings(self) -> dict:
        """See `System`."""
        settings = {
            "kind": self.kind,
            "target": self.target,
            "adapter": self.adapter,
            "identity": self.identity,
            "system_prompt": SYSTEM_PROMPT,
            "history": "text",
        }
        if self.kind == "video":
            settings |= {"num_frames": self.num_frames, "frames_as": self.frames_as}
        return settings | self.common.decoding()

    @cached_property
    def model(self):
        """The model, with its adapter if it has one."""
        model = load_baseline(self.kind, self.target, dtype=self.common.dtype)
        if self.adapter is not None:
            model = PeftModel.from_pretrained(model, self.adapter)
        return model.to(self.common.place).eval()

    @cached_property
    def prompts(self) -> BaselinePrompts:
        """The builder of the model's inputs."""
        processor = load_processor(self.kind, self.target)
        return BaselinePrompts(processor, self.kind, longest_input(self.model), self.num_frames, self.frames_as)

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """See `System`."""
        rooms = [self.common.max_new_tokens] * len(samples)
        batch, rows, notes = self.prompts.encode([sample["prompt"] for sample in samples], rooms)
        replies = [Reply("") for _ in samples]
        if rows:
            for row, reply in zip(rows, self._generate(batch, [seeds[row] for row in rows]), strict=True):
                replies[row] = reply
        for reply, note in zip(replies, notes, strict=True):
            reply.add(note=note)
        return replies

    @torch.inference_mode()
    def _generate(self, batch, seeds: list[int]) -> list[Reply]:
        model, options = self.model, {"max_new_tokens": self.common.max_new_tokens, **self.common.penalties()}
        if self.common.temperature is not None:
            top_p = 1.0 if self.common.top_p is None else self.common.top_p
            options["logits_processor"] = [SeededSampler(seeds, self.common.temperature, top_p=top_p)]
        output = model.generate(**batch.to(model.device, model.dtype), **plain_decoding(**options))
        written = output[:, batch["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        replies, decode = [], WrittenDecoder(self.prompts.tokenizer)
        for ids, prompt in zip(written.tolist(), batch["attention_mask"].sum(1).tolist(), strict=True):
            length = next((place for place, token in enumerate(ids) if token in ends), None)
            about = {
                "finish_reason": "length" if length is None else "stop",
                "tokens": len(ids) if length is None else length,
                "prompt_tokens": prompt,
            }
            read = self.prompts.read_written(decode.text(ids))
            replies.append(Reply(read.reply, about))
            replies[-1].add(thought=read.thought, note=read.note())
        return replies

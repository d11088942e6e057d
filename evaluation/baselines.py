"""
The models that ours is compared with, run by transformers (paper's Sec. 4.3, Table 1):

    qwen=chat:Qwen/Qwen2.5-7B-Instruct                                the history as text
    qwen_ft=chat:Qwen/Qwen2.5-7B-Instruct,adapter=runs/baselines/chat    fine-tuned by `trainers/baseline.py`
    qwen_audio=audio:Qwen/Qwen2-Audio-7B-Instruct                     also hears the last turn
    llava=video:llava-hf/LLaVA-NeXT-Video-7B-hf                       also sees it

What they are shown: `trainers/baseline_prompts.py`.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel

from empathic.data_prep.counter import identity_of
from empathic.evaluation.systems import Common, Reply
from empathic.sampling import SeededSampler
from empathic.trainers.baseline_models import load_baseline, load_processor, longest_input
from empathic.trainers.baseline_prompts import FRAMES_AS, KINDS, SYSTEM_PROMPT, BaselinePrompts

# Options of a spec beside the common ones, as `systems.open_system` reads them.
OPTIONS = {"adapter": str, "num_frames": int, "frames_as": str}


class BaselineSystem:
    """
    A chat, audio or video model of transformers, greedy unless a temperature is given.

    Args:
        name: of the system.
        kind: `chat`, `audio` or `video`.
        target: Hub id or folder.
        common: see `Common`.
        adapter: folder or Hub id of a PEFT adapter for it.
        num_frames: of a clip, evenly spaced (8 as for our model).
        frames_as: `video` or `images`; None: a video if the model's processor has a part for it.

    Raises:
        ValueError: for a number or a choice out of range.
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
        if kind not in KINDS:
            raise ValueError(f"{name}: the kind is {kind!r}; it is one of {', '.join(KINDS)}.")
        if num_frames < 1:
            raise ValueError(f"{name}: num_frames is {num_frames}; it must be at least 1.")
        if frames_as not in (None, *FRAMES_AS):
            raise ValueError(f"{name}: frames_as is {frames_as!r}; it is one of {', '.join(FRAMES_AS)}.")
        self.name, self.kind, self.target, self.common, self.adapter = name, kind, target, common, adapter
        self.num_frames, self.frames_as, self.batch_size = num_frames, frames_as, common.batch_size

    @cached_property
    def identity(self) -> str:
        """Another one for other weights; as of `systems.Checkpoint`."""
        parts = [identity_of(self.target)]
        if self.adapter is not None:
            parts.append(identity_of(self.adapter) if Path(self.adapter).is_dir() else self.adapter)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

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
        """What makes its inputs."""
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
            if note:
                reply.extra["note"] = note
        return replies

    @torch.inference_mode()
    def _generate(self, batch, seeds: list[int]) -> list[Reply]:
        model, options = self.model, {"do_sample": False, "max_new_tokens": self.common.max_new_tokens}
        if self.common.temperature is not None:
            top_p = 1.0 if self.common.top_p is None else self.common.top_p
            options["logits_processor"] = [SeededSampler(seeds, self.common.temperature, top_p=top_p)]
        output = model.generate(**batch.to(model.device, model.dtype), **options)
        written = output[:, batch["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        texts = self.prompts.tokenizer.batch_decode(written, skip_special_tokens=True)
        replies = []
        for text, ids, prompt in zip(texts, written.tolist(), batch["attention_mask"].sum(1).tolist(), strict=True):
            length = next((place for place, token in enumerate(ids) if token in ends), None)
            about = {
                "finish_reason": "length" if length is None else "stop",
                "tokens": len(ids) if length is None else length,
                "prompt_tokens": prompt,
            }
            replies.append(Reply(self.prompts.read_reply(text), about))
        return replies

"""Our model, and its ablations (paper's Table 2)."""

from functools import cached_property

from peft import PeftModel

from ...data_prep.clip_digests import MEDIA_KINDS
from ...data_prep.counter.build import identity_of
from ...files import fingerprint
from ...hub.model_card import read_record
from ...processing_empathic import EmpathicProcessor
from ...sampling import SeededSampler
from ...trainers.checkpoints.stage_folder import load_model
from ...trainers.samples import dialogue_sample
from ..generation import answer, prepare_readable
from .base import Common, Reply

HISTORIES = ("memory", "text", "none")


class LazyCheckpoint:
    """
    A checkpoint of our model, loaded on first use.

    Args:
        path: whole checkpoint, stage folder or Hub id.
        common: gives the device and the dtype.
    """

    def __init__(self, path: str, common: Common):
        self.path, self.common = path, common

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the weights, from the names, sizes and times of the files, or the Hub commit."""
        try:
            return fingerprint(identity_of(self.path))[:16]
        except OSError as error:
            raise ValueError(
                f"{self.path} is not a folder, and not an available Hub model ({str(error).splitlines()[0]})."
            ) from error

    @cached_property
    def trained_with(self) -> dict:
        """`history` and `media` of the last `dialogue` stage, as far as the checkpoint records them."""
        runs = [run["settings"] for run in read_record(self.path)["runs"] if run["stage"] == "dialogue"]
        names = {"history": "history", "use_media": "media"}
        return {names[name]: value for name, value in (runs[-1] if runs else {}).items() if name in names}

    @cached_property
    def model(self):
        """The model, with its adapter if it has one."""
        return load_model(self.path, dtype=self.common.dtype).to(self.common.place).eval()

    @cached_property
    def processor(self) -> EmpathicProcessor:
        return EmpathicProcessor.from_pretrained(self.path)


class EmpathicSystem:
    """
    Our model, or one of its ablations (paper's Table 2).

    A clip that cannot be read is left out, and the reply's `note` says so. If a prompt is longer than the model's
    context, the oldest turns are left out, and the note says how many.

    Args:
        name: name of the system.
        target: whole checkpoint, stage folder or Hub id.
        common: see `Common`.
        history: earlier turns as `memory` vectors, as `text`, or `none`.
        media: whether the model sees and hears the clip.

    Raises:
        ValueError: if the history is unknown.
    """

    def __init__(self, name: str, target: str, common: Common, history: str = "memory", media: bool = True):
        if history not in HISTORIES:
            raise ValueError(f"{name}: the history is {history!r}; it is one of {', '.join(HISTORIES)}.")
        self.name, self.target, self.common, self.history, self.media = name, target, common, history, media
        self.checkpoint, self.batch_size = LazyCheckpoint(target, common), common.batch_size
        self.clip_kinds = MEDIA_KINDS if media else ()

    @property
    def settings(self) -> dict:
        """See `System`."""
        return {
            "kind": "empathic",
            "target": self.target,
            "identity": self.checkpoint.identity,
            "history": self.history,
            "media": self.media,
            "trained_with": self.checkpoint.trained_with,
            **self.common.decoding(),
        }

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """See `System`."""
        prepared, notes = zip(*(self.prepare_sample(sample) for sample in samples), strict=True)
        rows = [place for place, inputs in enumerate(prepared) if inputs is not None]
        replies = [Reply("", {}) for _ in samples]
        if rows:
            found = self._answer([prepared[place] for place in rows], [seeds[place] for place in rows])
            for place, reply in zip(rows, found, strict=True):
                reason = "stop" if reply.finished else "length"
                about = {"finish_reason": reason, "tokens": reply.tokens}
                replies[place] = Reply(reply.text, {**about, "prompt_tokens": len(prepared[place]["input_ids"])})
                replies[place].add(thought=reply.thought, note=reply.note)
        for reply, note in zip(replies, notes, strict=True):
            reply.add(note=note)
        return replies

    def prepare_sample(self, sample: dict) -> tuple[dict | None, str | None]:
        """The model inputs (None if the sample does not fit), and a note on what was left out."""
        seen = dialogue_sample(sample, self.history, self.media)
        options = {"task": "dialogue", "history": seen["history"]}
        prepared, note = prepare_readable(self.checkpoint.processor, seen["messages"], **options)
        longest, left_out = self._longest(), 0
        while prepared is not None and longest is not None and len(prepared["input_ids"]) > longest:
            if left_out == len(seen["messages"]) - 1:
                return (
                    None,
                    f"The last turn alone has {len(prepared['input_ids'])} tokens; there is room for {longest}.",
                )
            left_out += 1
            prepared, note = prepare_readable(self.checkpoint.processor, seen["messages"][left_out:], **options)
        if left_out:
            note = " ".join(
                [f"The {left_out} oldest turns are left out: there is room for {longest} tokens.", note or ""]
            )
        return prepared, note and note.strip()

    def _longest(self) -> int | None:
        """Maximum number of tokens in a prompt; None if the architecture has no limit."""
        model = self.checkpoint.model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        positions = getattr(base.config.text_config, "max_position_embeddings", None)  # not every architecture has it
        return None if positions is None else positions - self.common.max_new_tokens

    def _answer(self, prepared: list[dict], seeds: list[int]) -> list:
        model, options = self.checkpoint.model, self.common.penalties()
        if self.common.temperature is not None:
            top_p = 1.0 if self.common.top_p is None else self.common.top_p
            options["logits_processor"] = [SeededSampler(seeds, self.common.temperature, top_p=top_p)]
        return answer(model, self.checkpoint.processor, prepared, self.common.max_new_tokens, **options)

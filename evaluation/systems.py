"""
Whatever replies to conversations, behind one door: our model, its ablations, and the models it is compared with.

    open_system("ours=empathic:runs/epo")
    open_system("no_media=empathic:runs/dialogue_mc,media=false")

A new kind is a class with what `System` asks for, and a case in `open_system`.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from peft import PeftModel

from empathic.data_prep.counter import identity_of
from empathic.evaluation.generation import answer, prepare_readable
from empathic.processing_empathic import EmpathicProcessor
from empathic.sampling import Sampling, SeededSampler
from empathic.trainers.checkpoint import load_model
from empathic.trainers.model_card import read_record
from empathic.trainers.samples import dialogue_sample

KINDS = ("empathic", "chat", "audio", "video", "openai")
HISTORIES = ("memory", "text", "none")
NAME = re.compile(r"[\w.+-]+")  # it names files


@dataclass
class Reply:
    """
    A system's reply.

    Args:
        text: of it, without white space around; empty where there is none, and then `extra` has a `note` that says why.
        extra: what else is worth keeping, as JSON: `finish_reason` (`stop` or `length`), `tokens`, `prompt_tokens`,
            `cost`, and `note`: what the system could not read, or had to leave out.
    """

    text: str
    extra: dict = field(default_factory=dict)


class System(Protocol):
    """
    What replies.

    Attributes:
        name: of its row in the tables, and of its files.
        settings: all that decides its replies, as JSON and without secrets. Replies that were made under other ones are
            never taken for its own.
        batch_size: samples that it is given at once.
    """

    name: str
    settings: dict
    batch_size: int

    def reply(self, samples: list[dict], seeds: list[int]) -> list[Reply]:
        """
        A reply to each sample, in order.

        Args:
            samples: items of `DialogueSamples`; nothing but their `prompt` may be looked at.
            seeds: of sampling, one a sample.
        """


@dataclass(frozen=True)
class Common:
    """
    What all systems are told alike, unless a spec says otherwise for one of them.

    Args:
        batch_size: replies made at once.
        max_new_tokens: length of a reply at most.
        temperature: of sampling; None: the likeliest token each time, so that a reply can be had again.
        top_p: with a temperature, samples from the likeliest tokens of so much probability.
        device: such as cpu or cuda:1; a GPU if there is one by default.
        dtype: of the weights: auto (as they were saved), float32, bfloat16 or float16.
    """

    batch_size: int = 16
    max_new_tokens: int = 64
    temperature: float | None = None
    top_p: float | None = None
    device: str | None = None
    dtype: str = "auto"

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")
        if self.temperature is None and self.top_p is not None:
            raise ValueError(f"top_p is {self.top_p}, but without a temperature nothing is sampled. Give both.")
        Sampling(self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)  # it knows their ranges

    @property
    def place(self) -> str:
        """The device, chosen where none is named."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def decoding(self) -> dict:
        """What decides the replies, for `System.settings`; where they are made does not count."""
        return {name: value for name, value in asdict(self).items() if name != "device"}


def boolean(text: str) -> bool:
    """`true` or `false`, as an option of a spec."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not true or false")
    return text == "true"


COMMON_OPTIONS = {"batch_size": int, "max_new_tokens": int, "temperature": float, "top_p": float, "dtype": str}
EMPATHIC_OPTIONS = {"history": str, "media": boolean}


def open_system(spec: str, **common) -> System:
    """
    The system that a spec names. Its weights are loaded when it first replies.

    Args:
        spec: `NAME=KIND:TARGET[,option=value...]`; without `NAME=` it is called by its target's last part. The options
            of every kind: batch_size, max_new_tokens, temperature, top_p, dtype. Of each kind:
            `empathic:PATH_OR_ID`: history (memory, text or none), media (true or false);
            `chat:ID`, `audio:ID`, `video:ID`: as of `baselines.BaselineSystem`;
            `openai:MODEL@BASE_URL`: as of `endpoint.EndpointSystem`.
        common: of `Common`.

    Raises:
        ValueError: for a spec that cannot be read, with what is wrong.
    """
    name, kind, target, options = read_spec(spec)
    match kind:
        case "empathic":
            common, options = _options(spec, options, EMPATHIC_OPTIONS, Common(**common))
            return EmpathicSystem(name, target, common, **options)
        case "chat" | "audio" | "video":
            from empathic.evaluation import baselines  # it imports this module

            common, options = _options(spec, options, baselines.OPTIONS, Common(**common))
            return baselines.BaselineSystem(name, kind, target, common, **options)
        case "openai":
            from empathic.evaluation import endpoint

            common, options = _options(spec, options, endpoint.OPTIONS, Common(**common))
            return endpoint.EndpointSystem(name, target, common, **options)
    raise ValueError(f"{spec}: there is no kind {kind!r}; the kinds are {', '.join(KINDS)}.")


def read_spec(spec: str) -> tuple[str, str, str, dict[str, str]]:
    """`NAME=KIND:TARGET,option=value` as (name, kind, target, options)."""
    head, *pairs = spec.split(",")
    match = re.fullmatch(r"(?:([^=:/]*)=)?([a-z_]+):(.+)", head)
    if match is None:
        raise ValueError(f"{spec}: is no system. Write NAME=KIND:TARGET, such as ours=empathic:{head or 'runs/epo'}.")
    name, kind, target = match.groups()
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if name is None:
        name = re.sub(r"[^\w.+-]+", "-", target.partition("@")[0].rstrip("/").split("/")[-1]).strip("-")
    if not NAME.fullmatch(name):
        raise ValueError(f"{spec}: the name {name!r} names files; use letters, digits and . _ + - only.")
    return name, kind, target, options


def _options(spec: str, given: dict[str, str], own: dict[str, Callable], common: Common) -> tuple[Common, dict]:
    """Options of a spec as values: those of `Common`, put into it, and the kind's own."""
    known, values = COMMON_OPTIONS | own, {}
    for name, text in given.items():
        if name not in known:
            raise ValueError(f"{spec}: there is no option {name!r}; this kind has {', '.join(known)}.")
        try:
            values[name] = known[name](text)
        except ValueError as error:
            raise ValueError(f"{spec}: {name}: {error}") from None
    shared = {name: value for name, value in values.items() if name not in own}
    try:
        return replace(common, **shared), {name: value for name, value in values.items() if name in own}
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None


class Checkpoint:
    """
    A checkpoint of ours, loaded when it is first needed.

    Args:
        path: whole checkpoint, stage's folder or Hub id.
        common: where and in which precision.
    """

    def __init__(self, path: str, common: Common):
        self.path, self.common = path, common

    @cached_property
    def identity(self) -> str:
        """Another one for other weights: from names, sizes and times of files, or the commit on the Hub."""
        try:
            return hashlib.sha256(json.dumps(identity_of(self.path)).encode()).hexdigest()[:16]
        except OSError as error:
            raise ValueError(
                f"{self.path}: is no folder, and no model of the Hub to be had now ({str(error).splitlines()[0]})."
            ) from error

    @cached_property
    def trained_with(self) -> dict:
        """`history` and `media` of the stage `dialogue` that made it, as far as the checkpoint knows them."""
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
    Our model, or an ablation of it (paper's Table 2).

    A clip that cannot be read is left out, and the reply's `note` says so. Where a prompt is longer than the model
    reads, its oldest turns are left out, and the note says how many.

    Args:
        name: of the system.
        target: whole checkpoint, stage's folder or Hub id.
        common: see `Common`.
        history: earlier turns as `memory` vectors, as `text`, or `none`.
        media: whether it sees and hears the clip.

    Raises:
        ValueError: for another history.
    """

    def __init__(self, name: str, target: str, common: Common, history: str = "memory", media: bool = True):
        if history not in HISTORIES:
            raise ValueError(f"{name}: the history is {history!r}; it is one of {', '.join(HISTORIES)}.")
        self.name, self.target, self.common, self.history, self.media = name, target, common, history, media
        self.checkpoint, self.batch_size = Checkpoint(target, common), common.batch_size

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
        prepared, notes = zip(*(self._prepare(sample) for sample in samples), strict=True)
        rows = [place for place, inputs in enumerate(prepared) if inputs is not None]
        replies = [Reply("", {}) for _ in samples]
        if rows:
            found = self._answer([prepared[place] for place in rows], [seeds[place] for place in rows])
            for place, reply in zip(rows, found, strict=True):
                reason = "stop" if reply.finished else "length"
                about = {"finish_reason": reason, "tokens": reply.tokens}
                replies[place] = Reply(reply.text, {**about, "prompt_tokens": len(prepared[place]["input_ids"])})
        for reply, note in zip(replies, notes, strict=True):
            if note:
                reply.extra["note"] = note
        return replies

    def _prepare(self, sample: dict) -> tuple[dict | None, str | None]:
        """What the model reads, None if nothing can be; and what was left out."""
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
        """Tokens that a prompt may have."""
        model = self.checkpoint.model
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        positions = getattr(base.config.text_config, "max_position_embeddings", None)  # not every architecture has it
        return None if positions is None else positions - self.common.max_new_tokens

    def _answer(self, prepared: list[dict], seeds: list[int]) -> list:
        model, options = self.checkpoint.model, {}
        if self.common.temperature is not None:
            top_p = 1.0 if self.common.top_p is None else self.common.top_p
            options["logits_processor"] = [SeededSampler(seeds, self.common.temperature, top_p=top_p)]
        return answer(model, self.checkpoint.processor, prepared, self.common.max_new_tokens, **options)

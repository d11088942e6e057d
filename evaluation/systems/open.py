"""
Open a system from its spec:

    open_system("ours=empathic:runs/epo")
    open_system("no_media=empathic:runs/dialogue_mc,media=false")

To add a kind, write a class with the interface `System` and add a case to `open_system`.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from . import endpoint, transformers_model
from .base import Common, System, boolean
from .ours import EmpathicSystem

SYSTEM_KINDS = ("empathic", "chat", "audio", "video", "openai")
NAME = re.compile(r"[\w.+-]+")  # used in file names
COMMON_OPTIONS = {
    "batch_size": int,
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "dtype": str,
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
}
EMPATHIC_OPTIONS = {"history": str, "media": boolean}


def open_system(spec: str, **common) -> System:
    """
    Create the system described by a spec. Its weights are loaded at the first reply.

    Args:
        spec: `NAME=KIND:TARGET[,option=value...]`. The default name is the last part of the target. All kinds have the
            options batch_size, max_new_tokens, temperature, top_p, dtype, repetition_penalty and
            no_repeat_ngram_size. Further options of each kind:
            `empathic:PATH_OR_ID`: history (memory, text or none), media (true or false);
            `chat:ID`, `audio:ID`, `video:ID`: see `transformers_model.BaselineSystem`;
            `openai:MODEL@BASE_URL`: see `endpoint.EndpointSystem`.
        common: arguments of `Common`.

    Raises:
        ValueError: if the spec cannot be parsed; the message says what is wrong.
    """
    name, kind, target, options = read_spec(spec)
    match kind:
        case "empathic":
            common, options = _options(spec, options, EMPATHIC_OPTIONS, Common(**common))
            return EmpathicSystem(name, target, common, **options)
        case "chat" | "audio" | "video":
            common, options = _options(spec, options, transformers_model.OPTIONS, Common(**common))
            return transformers_model.BaselineSystem(name, kind, target, common, **options)
        case "openai":
            common, options = _options(spec, options, endpoint.OPTIONS, Common(**common))
            return endpoint.EndpointSystem(name, target, common, **options)
    raise ValueError(f"{spec}: unknown kind {kind!r}; the kinds are {', '.join(SYSTEM_KINDS)}.")


def read_spec(spec: str) -> tuple[str, str, str, dict[str, str]]:
    """Parse `NAME=KIND:TARGET,option=value` into (name, kind, target, options)."""
    head, *pairs = spec.split(",")
    match = re.fullmatch(r"(?:([^=:/]*)=)?([a-z_]+):(.+)", head)
    if match is None:
        raise ValueError(
            f"{spec} is not a system spec. Write NAME=KIND:TARGET, such as ours=empathic:{head or 'runs/epo'}."
        )
    name, kind, target = match.groups()
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if name is None:
        name = re.sub(r"[^\w.+-]+", "-", target.partition("@")[0].rstrip("/").split("/")[-1]).strip("-")
    if not NAME.fullmatch(name):
        raise ValueError(f"{spec}: the name {name!r} is used in file names; use only letters, digits and . _ + -")
    return name, kind, target, options


def _options(spec: str, given: dict[str, str], own: dict[str, Callable], common: Common) -> tuple[Common, dict]:
    """Parse the options of a spec: `common` with the given values, and the options that only this kind has."""
    known, values = COMMON_OPTIONS | own, {}
    for name, text in given.items():
        if name not in known:
            raise ValueError(f"{spec}: unknown option {name!r}; this kind has {', '.join(known)}.")
        try:
            values[name] = known[name](text)
        except ValueError as error:
            raise ValueError(f"{spec}: {name}: {error}") from None
    shared = {name: value for name, value in values.items() if name not in own}
    try:
        return replace(common, **shared), {name: value for name, value in values.items() if name in own}
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None

"""
Separate a model's reply from the thoughts that reasoning models write before it.

The families mark their thoughts differently: `<think>...</think>` (DeepSeek, Qwen and others), `[THINK]...[/THINK]`
(Mistral), channels (gpt-oss, Gemma), and more. A chat template may write the opening marker itself, so that the model
writes only the end; and the maximum length may cut a thought off.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

_TAGS = "think|thinking|thought|thoughts|reasoning|seed:think|ant_thinking"
_OPENING = (
    rf"<(?:{_TAGS})>|\[THINK\]|◁think▷|<\|START_THINKING\|>|<\|begin_of_thought\|>|<\|inner_prefix\|>"
    r"|<\|channel>thought\b|<unused94>thought\b"
)
_CLOSING = (
    rf"</(?:{_TAGS})>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|end_of_thought\|>|<\|inner_suffix\|>"
    r"|<channel\|>|<unused95>"
)
# The openings that take several tokens; the others are single tokens.
_WRITTEN_OPENINGS = (*(f"<{tag}>" for tag in _TAGS.split("|")), "[think]", "<|channel>thought", "<unused94>thought")
_MARKER = re.compile(rf"(?P<open>{_OPENING})|(?P<close>{_CLOSING})", re.IGNORECASE)
# Some families also mark the reply that follows a thought.
_REPLY_OPENING = r"<(?:answer|response)>|<\|START_RESPONSE\|>|<\|begin_of_solution\|>|\[BEGIN FINAL RESPONSE\]"
_REPLY_CLOSING = r"</(?:answer|response)>|<\|END_RESPONSE\|>|<\|end_of_solution\|>|\[END FINAL RESPONSE\]"
_REPLY_MARKS = re.compile(rf"^\s*(?:{_REPLY_OPENING})\s*|\s*(?:{_REPLY_CLOSING})\s*$", re.IGNORECASE)
# gpt-oss: each message has a channel (`analysis`, `commentary` or `final`), and only `final` is meant for the user.
_CHANNEL = "<|channel|>"
_HEADER = re.compile(r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_MESSAGE_END = re.compile(r"<\|(?:end|return|call|start|channel)\|>.*", re.DOTALL)
_CHANNEL_TOKENS = re.compile(r"<\|(?:channel|message|start|end|return|call|constrain)\|>")
# The same text from a server that drops the special tokens.
_GLUED = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z\"'“‘(])")
_GLUED_FINAL = "assistantfinal"
# Special tokens that a decoder must keep, because they are markers. Part of a Gemma marker is plain text.
_KEPT_TOKENS = re.compile(rf"{_OPENING}|{_CLOSING}|{_REPLY_OPENING}|{_REPLY_CLOSING}|<\|channel>|<unused94>")


class Written(NamedTuple):
    """
    What a model wrote.

    Attributes:
        reply: the reply, stripped; empty if the model wrote only a thought.
        thought: the thought, stripped; empty if there is none.
        is_cut: whether the text ends inside a thought.
    """

    reply: str
    thought: str = ""
    is_cut: bool = False

    def note(self) -> str | None:
        """Why there is no reply, if the model wrote only a thought."""
        if self.reply or not (self.thought or self.is_cut):
            return None
        if self.is_cut:
            return "The thought of the model was cut off, so there is no reply; raise max_new_tokens."
        return "The model wrote only a thought, so there is no reply."


def read_written(text: str, in_thought: bool = False) -> Written:
    """
    Separate the reply from the thoughts.

    Args:
        text: the text that the model wrote, with the markers of its thoughts.
        in_thought: whether the prompt ends inside a thought, see `ends_in_thought`.

    Example: "<think>She is sad.</think> I am sorry." has the reply "I am sorry."; so has "She is sad.</think> I am
    sorry.". "<think>She is" has none.
    """
    channels = _read_channels(text)
    if channels is not None:
        return channels
    reply, thought, start = "", "", 0
    for marker in _MARKER.finditer(text):
        piece, start = text[start : marker.start()], marker.end()
        if in_thought:
            thought += piece
        elif marker["close"]:  # its opening marker is in the prompt, so that all before is a thought
            thought, reply = f"{thought}{reply}{piece}", ""
        else:
            reply += piece
        in_thought = marker["open"] is not None
    if in_thought:
        thought += text[start:]
    else:
        reply += text[start:]
    if thought.strip():
        reply = _REPLY_MARKS.sub("", reply)
    return Written(reply.strip(), thought.strip(), in_thought)


def _read_channels(text: str) -> Written | None:
    """`read_written` for gpt-oss; None for a text without channels."""
    if _CHANNEL in text:
        before, *parts = _HEADER.split(text)
        messages = [
            (name, _MESSAGE_END.sub("", content)) for name, content in zip(parts[::2], parts[1::2], strict=True)
        ]
        finals = [content for name, content in messages if name == "final"]
        thoughts = [_MESSAGE_END.sub("", before), *(content for name, content in messages if name != "final")]
        reply, thought = finals[-1] if finals else "", "\n".join(thoughts)
    elif _GLUED.match(text):
        thought, _, reply = text.partition(_GLUED_FINAL)
        thought, finals = _GLUED.sub("", thought, count=1), [reply] if reply else []
    else:
        return None
    return Written(*(_CHANNEL_TOKENS.sub("", part).strip() for part in (reply, thought)), is_cut=not finals)


def is_thought_so_far(text: str) -> bool:
    """Whether a text that is still being written is so far only a thought, or may be the beginning of its marker."""
    start = text.lstrip()
    if start.startswith(_CHANNEL) or re.match(_OPENING, start, re.IGNORECASE):
        return not read_written(text).reply
    return any(marker.startswith(start.lower()) for marker in _WRITTEN_OPENINGS)


def ends_in_thought(prompt: str) -> bool:
    """Whether a prompt, rendered by a chat template, ends inside a thought that the model continues."""
    markers = list(_MARKER.finditer(prompt))
    return bool(markers) and markers[-1]["open"] is not None and not prompt[markers[-1].end() :].strip()


class WrittenDecoder:
    """
    Decode the tokens that a model wrote, and separate the reply from the thoughts.

    Some families mark their thoughts by special tokens, which `skip_special_tokens=True` would drop.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {number: str(token) for number, token in added.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
        has_channels = _CHANNEL in special.values()
        self._dropped = {
            number
            for number, token in special.items()
            if not _KEPT_TOKENS.fullmatch(token) and not (has_channels and _CHANNEL_TOKENS.fullmatch(token))
        }

    def text(self, ids: Sequence[int]) -> str:
        """Decode tokens to text with the markers of thoughts, but without other special tokens."""
        kept = [number for number in ids if number not in self._dropped]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def __call__(self, ids: Sequence[int], in_thought: bool = False) -> Written:
        """See `read_written`."""
        return read_written(self.text(ids), in_thought)

"""OpenAI's chat completions protocol: read requests, which are untrusted, and write responses."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field

from .prompts import Utterance
from .replies import Felt, Memory, Options, TokenScore

ROLES = ("system", "developer", "user", "assistant")
SOUND_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "aac", "m4a", "mp4", "webm")
MOST_STOPS, MOST_LOGPROBS = 4, 20
# Fields that are read; any other field is ignored.
FIELDS = {
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens",
    "stop", "seed", "n", "logprobs", "top_logprobs", "modalities", "details",
}  # fmt: skip


class APIError(Exception):
    """
    An error for the client, in OpenAI's form.

    Args:
        status: the HTTP status.
        message: the value, the rule and the remedy.
        param: the field that is wrong, such as `messages.2.content.0.input_audio.data`.
        code, kind: OpenAI's code and type of the error.
        headers: HTTP headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """
    Limits on what a client may send.

    Attributes:
        body_megabytes: maximum size of a request.
        media_megabytes: maximum size of a clip.
        seconds: maximum length of a clip.
        characters: maximum length of a message's text.
        total_characters: maximum length of all texts of a request.
        tokens: maximum length of a reply.
        upload_seconds, decode_seconds, fetch_seconds: maximum time for receiving a request, for decoding a clip, and
            for downloading a clip.
    """

    body_megabytes: float = 64
    media_megabytes: float = 32
    seconds: float = 60
    characters: int = 32_000
    total_characters: int = 2_000_000
    tokens: int = 512
    upload_seconds: float = 120
    decode_seconds: float = 30
    fetch_seconds: float = 30


@dataclass(frozen=True)
class MediaPart:
    """
    A clip of a turn.

    Attributes:
        param: the field that holds it.
        kind: `audio` or `video`. The sound of a video is used if the turn has no other sound.
        data: base64; None for a URL.
        url: a data URL or an http URL.
    """

    param: str
    kind: str
    data: str | None = None
    url: str | None = None


@dataclass
class ChatRequest:
    """A request that was read. `ignored` are the names of its unknown fields."""

    model: str
    system: str | None
    history: list[Utterance]
    turn: Utterance
    media: list[MediaPart]
    options: Options
    stream: bool = False
    include_usage: bool = False
    details: bool = False
    ignored: list[str] = field(default_factory=list)


def shown(value) -> str:
    """Return a value as JSON for an error message, shortened."""
    if isinstance(value, (dict, list)):
        return {dict: "an object", list: "an array"}[type(value)]
    try:
        text = json.dumps(value, ensure_ascii=True)
    except ValueError:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def wrong(param: str, value, rule: str, code: str | None = None) -> APIError:
    """Return the error for a field with a wrong value."""
    return APIError(400, f"{param} is {shown(value)}; {rule}", param, code)


def read_json(data: bytes) -> dict:
    """
    Parse the body of a request.

    Raises:
        APIError: unless it is a JSON object.
    """

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON number")

    try:
        body = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise APIError(400, "The body is nested too deeply. Send a flat chat request.", code="invalid_json") from None
    except ValueError as error:
        raise APIError(400, f"The body is not JSON ({error}). Send a JSON object.", code="invalid_json") from None
    if not isinstance(body, dict):
        raise APIError(400, f"The body is {shown(body)}; send a JSON object.", code="invalid_json")
    return body


def _number(body: dict, name: str, low: float, high: float, above: bool = False) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):  # refuses NaN too
        raise wrong(name, value, f"give a number {f'above {low:g}' if above else f'from {low:g}'} up to {high:g}.")
    return float(value)


def _integer(body: dict, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong(name, value, f"give a whole number from {low} to {high}.")
    return value


def _boolean(body: dict, name: str, where: str = "") -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise wrong(where + name, value, "give true or false.")
    return value


def _text(value, param: str, limits: Limits) -> str:
    if not isinstance(value, str):
        raise wrong(param, value, "give a string.")
    if len(value) > limits.characters:
        raise APIError(
            400,
            f"{param} has {len(value):,} characters; the limit is {limits.characters:,}. Shorten it.",
            param,
            "string_above_max_length",
        )
    return value


def _part(part, param: str, limits: Limits) -> str | MediaPart:
    """Read a part of a message's content: a text or a clip."""
    if not isinstance(part, dict):
        raise wrong(param, part, "give an object with a `type`.")
    kind = part.get("type")
    if kind == "text":
        return _text(part.get("text"), f"{param}.text", limits)
    if kind == "input_audio":
        given = part.get(kind)
        if not isinstance(given, dict):
            raise wrong(f"{param}.{kind}", given, "give an object with `data` and `format`.")
        if not isinstance(given.get("data"), str):
            raise wrong(f"{param}.{kind}.data", given.get("data"), "give the sound as base64.")
        if given.get("format") not in SOUND_FORMATS:
            raise wrong(f"{param}.{kind}.format", given.get("format"), f"give one of {', '.join(SOUND_FORMATS)}.")
        return MediaPart(f"{param}.{kind}.data", "audio", data=given["data"])
    if kind in ("audio_url", "video_url"):
        given = part.get(kind)
        if not isinstance(given, dict) or not isinstance(given.get("url"), str):
            raise wrong(f"{param}.{kind}", given, "give an object with a `url`.")
        return MediaPart(f"{param}.{kind}.url", kind.removesuffix("_url"), url=given["url"])
    raise wrong(f"{param}.type", kind, "give text, input_audio, audio_url or video_url.")


def _content(message: dict, where: str, limits: Limits) -> tuple[str, list[MediaPart]]:
    content, param = message.get("content"), f"{where}.content".lstrip(".")
    if content is None and message["role"] == "assistant":
        return "", []
    if isinstance(content, str):
        return _text(content, param, limits), []
    if not isinstance(content, list):
        raise wrong(param, content, "give a string or an array of parts.")
    parts = [_part(part, f"{param}.{place}", limits) for place, part in enumerate(content)]
    media = [part for part in parts if isinstance(part, MediaPart)]
    if media and message["role"] != "user":
        raise APIError(
            400, f"{media[0].param}: only messages of the user may have clips. Leave it out.", media[0].param
        )
    for kind in ("audio", "video"):
        found = [part for part in media if part.kind == kind]
        if len(found) > 1:
            raise APIError(400, f"{found[1].param}: a message has at most one clip of a kind.", found[1].param)
    return "\n".join(part for part in parts if isinstance(part, str)), media


def _messages(body: dict, limits: Limits) -> tuple[str | None, list[Utterance], list[MediaPart]]:
    """
    Return the system prompt, the utterances, and the clips of the last one. The model reads instructions only before
    the conversation, so those that come later are joined to the first ones.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", messages if messages != [] else "empty", "give an array of messages.")
    systems: list[str] = []
    said: list[Utterance] = []
    media: list[MediaPart] = []
    last, total = "messages.0", 0
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if not isinstance(message, dict):
            raise wrong(where, message, "give an object with `role` and `content`.")
        role, name = message.get("role"), message.get("name")
        if role not in ROLES:
            raise wrong(f"{where}.role", role, f"give one of {', '.join(ROLES)}.")
        if name is not None and (not isinstance(name, str) or not 1 <= len(name) <= 64):
            raise wrong(f"{where}.name", name, "give a string of 1 to 64 characters.")
        text, clips = _content(message, where, limits)
        total += len(text)
        if total > limits.total_characters:
            raise APIError(
                400,
                f"The messages have more than {limits.total_characters:,} characters. Leave out the oldest.",
                "messages",
                "string_above_max_length",
            )
        if role in ("system", "developer"):
            systems.append(text)
        else:
            said.append(Utterance(role, name, text))
            last, media = where, clips
    if not said or said[-1].role != "user":
        role = said[-1].role if said else "system"
        raise wrong(f"{last}.role", role, "the model answers the user: end with a user message.")
    if not said[-1].text and not media:
        raise APIError(400, f"{last}.content is empty; give text, audio or video.", f"{last}.content")
    return ("\n\n".join(systems) if systems else None), said, media


def _stop(body: dict) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None:
        return ()
    stops = [stop] if isinstance(stop, str) else stop
    valid = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not valid or not all(isinstance(text, str) and 0 < len(text) <= 200 for text in stops):
        raise wrong("stop", stop, f"give a string, or up to {MOST_STOPS} strings, of 1 to 200 characters.")
    return tuple(stops)


def _model(body: dict, models: Collection[str]) -> str:
    asked, names = body.get("model"), " and ".join(map(repr, models))
    if not isinstance(asked, str):
        raise wrong("model", asked, f"give the name of the model, {names}.")
    if asked not in models:
        raise APIError(404, f"There is no model {shown(asked)}; this server has {names}.", "model", "model_not_found")
    return asked


def read_emotion(body: dict, models: Collection[str], limits: Limits) -> tuple[str, str, list[MediaPart], bool]:
    """
    Read a request for an emotion.

    Args:
        body, models, limits: see `read_chat`.

    Returns:
        the name of the model, the text, the clips, and whether the request is skipped if the server is busy.

    Raises:
        APIError: for the first field that is wrong; the error names it.
    """
    asked = _model(body, models)
    text, media = _content({"role": "user", "content": body.get("content")}, "", limits)
    return asked, text, media, _boolean(body, "if_idle")


def read_chat(body: dict, models: Collection[str], limits: Limits) -> ChatRequest:
    """
    Read a chat request.

    Args:
        body: the request, any JSON object.
        models: the names of the served models.
        limits: limits that the request must meet.

    Raises:
        APIError: for the first field that is wrong; the error names it.
    """
    asked = _model(body, models)
    system, said, media = _messages(body, limits)
    if _integer(body, "n", 1, 128) not in (None, 1):
        raise wrong("n", body["n"], "this server gives one reply: leave n out.")
    modalities = body.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise wrong("modalities", modalities, 'this model replies with text: give ["text"].')
    lengths = [_integer(body, name, 1, 1 << 31) for name in ("max_tokens", "max_completion_tokens")]
    top = _integer(body, "top_logprobs", 0, MOST_LOGPROBS)
    with_logprobs = _boolean(body, "logprobs")
    if top is not None and not with_logprobs:
        raise wrong("top_logprobs", top, "give it only with logprobs set to true.")
    stream = _boolean(body, "stream")
    stream_options = body.get("stream_options")
    if stream_options is not None and (not isinstance(stream_options, dict) or not stream):
        raise wrong("stream_options", stream_options, "give an object, and only with stream set to true.")
    return ChatRequest(
        model=asked,
        system=system,
        history=said[:-1],
        turn=said[-1],
        media=media,
        options=Options(
            max_tokens=min([limits.tokens, *(length for length in lengths if length is not None)]),
            temperature=_number(body, "temperature", 0, 2),
            top_p=_number(body, "top_p", 0, 1, above=True),
            seed=_integer(body, "seed", -(1 << 63), (1 << 63) - 1),
            stop=_stop(body),
            logprobs=(top or 0) if with_logprobs else None,
        ),
        stream=stream,
        include_usage=_boolean(stream_options or {}, "include_usage", "stream_options."),
        details=_boolean(body, "details"),
        ignored=sorted(name for name in body.keys() - FIELDS if body[name] is not None),
    )


# ------------------------------------------------------------------ responses


def usage(done) -> dict:
    """The `usage` object of a reply, from its `Done`."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": done.cached_tokens,
            "audio_tokens": done.audio_tokens,
            "video_tokens": done.video_tokens,
        },
    }


def emotion(felt: Felt | None) -> dict:
    """The extension field of a message with the recognized emotion; empty if there is none."""
    if felt is None or felt.emotions is None:
        return {}

    def shown_as(probabilities: dict[str, float]) -> dict:
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}

    alone = {kind: shown_as(found) for kind, found in felt.by_kind.items()}
    return {"emotion": {**shown_as(felt.emotions), **({"alone": alone} if alone else {})}}


def memory(kept: Memory | None) -> dict:
    """The extension field of a response with the memory of the conversation; empty without `details`."""
    return {} if kept is None else {"memory": asdict(kept)}


def logprobs(scores: Sequence[TokenScore], tokenizer) -> dict:
    """The `logprobs` object of a choice."""

    def entry(token: int, logprob: float) -> dict:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            {**entry(score.token, score.logprob), "top_logprobs": [entry(*pair) for pair in score.top]}
            for score in scores
        ],
        "refusal": None,
    }

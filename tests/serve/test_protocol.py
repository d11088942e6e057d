"""Requests are read or refused with the name of the wrong field, whatever they hold."""

import json
import random

import pytest

from empathic.serve.prompts import Utterance
from empathic.serve.protocol import APIError, Limits, MediaPart, read_chat, read_emotion, read_json

USER, BOT = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}
SOUND = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}


def read(body, **limits):
    return read_chat({"model": "m", "messages": [USER], **body}, ["m"], Limits(**limits))


def test_a_whole_request_is_read():
    video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGk="}}
    text = {"type": "text", "text": "look"}
    chat = read(
        {
            "messages": [
                {"role": "developer", "content": "be kind"},
                {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
                {"role": "user", "name": "clara", "content": [SOUND]},
                {"role": "assistant", "content": None},
                {"role": "user", "content": [video, text, SOUND, {"type": "text", "text": "here"}]},
            ],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_completion_tokens": 7,
            "max_tokens": 9,
            "stop": ["a", "b"],
            "seed": 3,
            "n": 1,
            "logprobs": True,
            "top_logprobs": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [],
            "user": "u",
            "frequency_penalty": None,
        }
    )
    assert chat.system == "be kind\n\nbe brief"
    assert chat.history == [Utterance("user", "clara", ""), Utterance("assistant", None, "")]
    assert chat.turn == Utterance("user", None, "look\nhere")
    assert chat.media == [
        MediaPart("messages.4.content.0.video_url.url", "video", url="data:video/mp4;base64,aGk="),
        MediaPart("messages.4.content.2.input_audio.data", "audio", data="aGk="),
    ]
    options = chat.options
    assert (options.temperature, options.top_p, options.max_tokens, options.seed) == (0.5, 0.9, 7, 3)
    assert options.stop == ("a", "b") and options.logprobs == 2
    assert chat.stream and chat.include_usage and chat.ignored == ["tools", "user"]


def test_later_instructions_are_joined_to_the_first_ones():
    systems = [{"role": role, "content": role} for role in ("system", "developer", "developer")]
    chat = read({"messages": [systems[0], {"role": "user", "content": [SOUND]}, systems[1]]})
    assert chat.system == "system\n\ndeveloper" and chat.turn == Utterance("user", None, "") and len(chat.media) == 1
    chat = read({"messages": [USER, systems[1], {"role": "assistant", "content": "a"}, USER]})
    assert chat.system == "developer" and len(chat.history) == 2 and chat.media == []


def test_what_is_absent_or_null_has_its_default():
    names = ("temperature", "top_p", "max_tokens", "stop", "seed", "n", "logprobs", "stream", "stream_options")
    chat = read(dict.fromkeys(names))
    assert chat == read({})
    assert chat.options.temperature is None and chat.options.logprobs is None and chat.options.max_tokens == 512
    assert read({"max_tokens": 10**6}, tokens=20).options.max_tokens == 20
    assert read({"temperature": 0}).options.temperature == 0 and read({"logprobs": True}).options.logprobs == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages.0"),
        ({"messages": [USER, {"role": "wizard", "content": "a"}]}, "messages.1.role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages.1.role"),
        ({"messages": [USER, BOT, {"role": "system", "content": "b"}]}, "messages.1.role"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0.input_audio"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": 1}}]}]},
            "messages.0.content.0.input_audio.data",
        ),
        (
            {"messages": [{"role": "user", "content": [{**SOUND, "input_audio": {"data": "", "format": "exe"}}]}]},
            "messages.0.content.0.input_audio.format",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": "x"}]}]},
            "messages.0.content.0.video_url",
        ),
        ({"messages": [{"role": "user", "content": [SOUND, SOUND]}]}, "messages.0.content.1.input_audio.data"),
        ({"messages": [{"role": "assistant", "content": [SOUND]}, USER]}, "messages.0.content.0.input_audio.data"),
        ({"messages": [{**USER, "name": ""}]}, "messages.0.name"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"seed": 1e3}, "seed"),
        ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(body, param):
    with pytest.raises(APIError) as caught:
        read(body)
    error = caught.value.body["error"]
    assert caught.value.status == 400 and error["param"] == param and param.rpartition(".")[2] in error["message"]
    assert error["type"] == "invalid_request_error" and error["message"].endswith(".")


def test_another_model_is_not_found():
    with pytest.raises(APIError) as caught:
        read({"model": "gpt"})
    assert caught.value.status == 404 and caught.value.body["error"]["code"] == "model_not_found"


def test_long_texts_are_refused():
    with pytest.raises(APIError, match=r"messages.0.content has 11 characters; the limit is 10"):
        read({"messages": [{"role": "user", "content": "x" * 11}]}, characters=10)
    with pytest.raises(APIError, match="more than 25 characters"):
        read({"messages": [{"role": "user", "content": "x" * 9}] * 3}, characters=10, total_characters=25)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"[1]",
        b"3",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
    ],
)
def test_what_is_no_json_object_is_refused(data):
    with pytest.raises(APIError) as caught:
        read_json(data)
    assert caught.value.status == 400 and caught.value.body["error"]["code"] == "invalid_json"
    assert len(caught.value.body["error"]["message"]) < 300


def test_no_request_raises_anything_but_an_api_error():
    """Valid requests with values replaced at random places."""
    rng = random.Random(0)
    junk = [
        None,
        True,
        -1,
        0,
        1e308,
        "",
        "x" * 300,
        "\ud800",
        [],
        {},
        [[]],
        {"type": "text"},
        [SOUND],
        {"role": "user"},
    ]
    whole = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [SOUND, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            USER,
        ],
        "temperature": 1.0, "stop": ["a"], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
        "top_logprobs": 1, "seed": 1, "max_tokens": 3,
    }  # fmt: skip

    def places(value, path=()):
        yield path
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield from places(inner, (*path, key))

    found = list(places(whole))
    refused = 0
    for _ in range(3000):
        body = json.loads(json.dumps(whole))
        for _ in range(rng.randint(1, 3)):
            *outer, last = rng.choice([path for path in found if path])
            try:
                target = body
                for key in outer:
                    target = target[key]
                target[last] = rng.choice(junk)
            except (KeyError, IndexError, TypeError):  # replaced before
                continue
        try:
            read_chat(body, ["m"], Limits())
        except APIError as error:
            refused += 1
            json.dumps(error.body)
    assert 1000 < refused < 3000


def test_several_models_and_details():
    body = {"messages": [USER], "details": True}
    assert [read_chat({**body, "model": name}, ["m", "n"], Limits()).model for name in "mn"] == ["m", "n"]
    assert read(body).details and not read({}).details and read(body).ignored == []
    with pytest.raises(APIError, match="this server has 'm' and 'n'") as caught:
        read_chat({**body, "model": "o"}, ["m", "n"], Limits())
    assert caught.value.status == 404
    with pytest.raises(APIError, match="details is 1"):
        read({"details": 1})


def test_a_request_for_an_emotion_is_read():
    content = [SOUND, {"type": "text", "text": "hello"}]
    name, text, media, if_idle = read_emotion({"model": "m", "content": content, "if_idle": True}, ["m"], Limits())
    assert (name, text, if_idle) == ("m", "hello", True) and [part.kind for part in media] == ["audio"]
    for content, param in ((None, "content"), ([{"type": "text", "text": 3}], "content.0.text"), ([SOUND] * 2, None)):
        with pytest.raises(APIError) as caught:
            read_emotion({"model": "m", "content": content}, ["m"], Limits())
        assert param is None or caught.value.body["error"]["param"] == param

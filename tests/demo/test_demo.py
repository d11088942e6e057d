"""The demo without a browser: conversations of visitors, uploads, the API over HTTP, and the Space."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from empathic.chat import ChatSession
from empathic.cli import main
from empathic.configuration_empathic import EMOTIONS
from empathic.demo.examples import read_examples
from empathic.demo.render import render_conversation
from empathic.demo.session import (
    Chatbot,
    ConversationError,
    NamedModel,
    ShownConversation,
    ShownReply,
    ShownTurn,
    Stopped,
)
from empathic.demo.uploads import Limits, UploadError, discard, read_upload
from empathic.emotions import name_emotion

NEW = 6  # tokens of a reply


@pytest.fixture
def checkpoint(model, processor):
    return NamedModel("tiny", model.eval(), processor)


@pytest.fixture
def chatbot(checkpoint):
    return Chatbot(checkpoint, max_new_tokens=NEW)


@pytest.fixture
def clips(clip):
    return read_upload(clip, ("audio", "video"), 2, Limits())


def whole(turns):
    """Return the last state of a turn."""
    *_, last = turns
    return last


def expected(checkpoint, said, **clips):
    """Return the replies of a plain session."""
    session = ChatSession(checkpoint.model, checkpoint.processor)
    return [
        session.reply(text, **(clips if text == said[-1] else {}), max_new_tokens=NEW, do_sample=False) for text in said
    ]


# ---------------------------------------------------------------------------------------------------- conversations


def test_a_turn_grows_and_ends_with_what_it_cost(chatbot, checkpoint, clips):
    states = list(chatbot.turn("a", ShownConversation(), "hello there", clips))
    assert states[0].answers == () and states[0].shown == ("audio", "video") and states[0].emotions is None
    assert set(states[1].emotions) == set(EMOTIONS) and states[1].answers == ()
    texts = [state.answers[0].text for state in states[2:]]
    assert len(texts) > 2 and all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == expected(checkpoint, ["hello there"], **clips)[0]
    conversation = ShownConversation().plus(states[-1])
    second = whole(chatbot.turn("a", conversation, "how are you")).answers[0]
    assert second.memory_vectors == 2 and second.history_tokens > 2 and second.seconds > 0


def test_visitors_share_nothing(chatbot, checkpoint):
    said = {"a": ["hello there", "how are you", "what did he say"], "b": ["i am fine thanks", "the old dog", "hello"]}
    conversations = {key: ShownConversation() for key in said}
    for texts in zip(*said.values(), strict=True):
        running = {key: chatbot.turn(key, conversations[key], text) for key, text in zip(said, texts, strict=True)}
        last = {}
        while running:  # both turns advance alternately
            for key in list(running):
                try:
                    last[key] = next(running[key])
                except StopIteration:
                    del running[key]
        conversations = {key: conversations[key].plus(last[key]) for key in said}
    for key, texts in said.items():
        assert [turn.text for turn in conversations[key].turns] == texts
        assert [turn.answers[0].text for turn in conversations[key].turns] == expected(checkpoint, texts)


def test_a_visitor_has_one_turn_at_a_time(chatbot):
    turns = chatbot.turn("a", ShownConversation(), "hello there")
    next(turns)
    with pytest.raises(ConversationError, match="still being answered"):
        next(chatbot.turn("a", ShownConversation(), "hello"))
    assert whole(chatbot.turn("b", ShownConversation(), "hello")).answers
    turns.close()
    assert whole(chatbot.turn("a", ShownConversation(), "hello")).answers


def test_stopping_forgets_the_turn(chatbot, checkpoint, clips):
    first = ShownConversation().plus(whole(chatbot.turn("a", ShownConversation(), "hello there")))
    turns = chatbot.turn("a", first, "what did he say", clips)
    while not next(turns).answers:
        pass
    chatbot.stop("a")
    with pytest.raises(Stopped):
        whole(turns)
    turn = whole(chatbot.turn("a", first, "how are you"))
    assert turn.answers[0].text == expected(checkpoint, ["hello there", "how are you"])[1]
    assert turn.answers[0].memory_vectors == 2


def test_retry_and_edit_take_the_clip_again(chatbot, checkpoint, clips):
    first = ShownConversation().plus(whole(chatbot.turn("a", ShownConversation(), "hello there")))
    second = first.plus(whole(chatbot.turn("a", first, "what did he say", clips)))
    again = chatbot.clips_of_last("a", second)
    assert again is clips
    with pytest.raises(ConversationError, match="no longer kept"):
        chatbot.clips_of_last("b", second)
    drawn = whole(chatbot.turn("a", second.without_last(), "what did he say", again, another=True))
    assert drawn.answers[0].memory_vectors == 2
    edited = first.plus(whole(chatbot.turn("a", first, "how are you", again)))
    said = ["hello there", "how are you"]
    assert [turn.answers[0].text for turn in edited.turns] == expected(checkpoint, said, **clips)
    assert chatbot.clips_of_last("a", edited) is clips
    with pytest.raises(ConversationError, match="no turn yet"):
        chatbot.clips_of_last("a", ShownConversation())


def test_comparisons_leave_the_conversation_as_it_is(model, checkpoint, clips):
    torch.manual_seed(5)
    other = type(model)(model.config).eval()
    chatbot = Chatbot(checkpoint, NamedModel("before", other, checkpoint.processor), max_new_tokens=NEW)
    conversation, said = ShownConversation(), ["hello there", "how are you"]
    for text in said:
        turn = whole(chatbot.turn("a", conversation, text, clips, list(chatbot.comparisons)))
        conversation = conversation.plus(turn)
    labels = ["tiny", "tiny, without voice and face", "tiny, without memory", "before"]
    assert [answer.label for answer in turn.answers] == labels
    assert [answer.memory_vectors for answer in turn.answers] == [2, 2, 0, 2]
    options = {"max_new_tokens": NEW, "do_sample": False}

    def fresh(model):
        session = ChatSession(model, checkpoint.processor)
        session.remember(*conversation.messages()[:2])
        return session

    assert turn.answers[0].text == fresh(checkpoint.model).reply(said[1], **clips, **options)
    assert turn.answers[1].text == fresh(checkpoint.model).reply(said[1], **options)
    assert turn.answers[2].text == ChatSession(checkpoint.model, checkpoint.processor).reply(
        said[1], **clips, **options
    )
    assert turn.answers[3].text == fresh(other).reply(said[1], **clips, **options)
    assert conversation.messages()[1]["content"] == conversation.turns[0].answers[0].text


def test_only_some_visitors_are_kept_and_the_others_lose_nothing(checkpoint):
    chatbot = Chatbot(checkpoint, max_new_tokens=NEW, kept_visitors=3)
    start = ShownConversation().plus(whole(chatbot.turn("0", ShownConversation(), "hello there")))
    for number in range(1, 21):
        whole(chatbot.turn(str(number), ShownConversation(), "hello"))
    assert chatbot.visitors == ["18", "19", "20"]
    second = whole(chatbot.turn("0", start, "how are you"))
    assert second.answers[0].text == expected(checkpoint, ["hello there", "how are you"])[1]
    chatbot.forget("0")
    chatbot.forget("nobody")
    assert chatbot.visitors == ["19", "20"]


def test_a_conversation_is_saved_and_taken_up(chatbot, checkpoint, clips):
    first = ShownConversation().plus(
        whole(chatbot.turn("a", ShownConversation(), "hello there", clips, ["without_memory"]))
    )
    loaded = ShownConversation.from_json(first.to_json())
    assert loaded == first and len(loaded.turns[0].answers) == 2
    turn = whole(chatbot.turn("b", loaded, "how are you"))
    session = ChatSession(checkpoint.model, checkpoint.processor)
    session.remember(*first.messages())
    assert turn.answers[0].text == session.reply("how are you", max_new_tokens=NEW, do_sample=False)


GOOD = {"text": "a", "shown": [], "emotions": None, "emotion_seconds": None}
ANSWER = {"label": "x", "text": "b", "seconds": 1.0, "memory_vectors": 0, "history_tokens": 0}


@pytest.mark.parametrize(
    "turns",
    [
        None,
        [GOOD],
        [{**GOOD, "answers": []}],
        [{**GOOD, "answers": [ANSWER] * 5}],
        [{**GOOD, "text": ["a"], "answers": [ANSWER]}],
        [{**GOOD, "text": "a" * 20_001, "answers": [ANSWER]}],
        [{**GOOD, "answers": [{**ANSWER, "seconds": "soon"}]}],
        [{**GOOD, "emotions": {"happy": 1}, "answers": [ANSWER]}],
        [{**GOOD, "answers": [ANSWER]}] * 201,
    ],
)
def test_other_files_are_no_conversations(turns):
    assert ShownConversation.from_record({"empathic_conversation": 1, "turns": [{**GOOD, "answers": [ANSWER]}]}).turns
    with pytest.raises(ConversationError):
        ShownConversation.from_record({"empathic_conversation": 1, "turns": turns})
    for content in ("", "[]", "[" * 100_000, '{"turns": []}', b"\xff\xfe\x00"):
        with pytest.raises(ConversationError):
            ShownConversation.from_json(content)


def test_half_an_emoji_is_replaced_wherever_it_comes_from(chatbot, tmp_path, clip):
    record = {
        "empathic_conversation": 1,
        "turns": [{**GOOD, "text": "half \ud83d", "answers": [{**ANSWER, "text": "\ude00"}]}],
    }
    found = ShownConversation.from_json(json.dumps(record))
    assert found.turns[0].text == "half \N{REPLACEMENT CHARACTER}"
    turn = whole(chatbot.turn("a", found, "hello \ud83d"))
    found.plus(turn).to_json().encode()
    render_conversation(found.plus(turn)).encode()
    shutil.copyfile(clip, tmp_path / "a.mp4")
    row = {"dialogue_id": "d", "turn": 0, "speaker": "user", "text": "half \ud83d", "video": "a.mp4"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert read_examples(tmp_path)[0].text == "half \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("value", [2**64, -1, 10**400, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["seconds", "memory_vectors", "history_tokens"])
def test_numbers_that_no_browser_reads_are_refused(name, value):
    record = {"empathic_conversation": 1, "turns": [{**GOOD, "answers": [{**ANSWER, name: value}]}]}
    with pytest.raises(ConversationError, match="damaged"):
        ShownConversation.from_json(json.dumps(record))


def test_empty_turns_and_endless_conversations_are_refused(chatbot):
    with pytest.raises(ConversationError, match="Say something"):
        next(chatbot.turn("a", ShownConversation(), "  "))
    full = ShownConversation((ShownTurn("a", answers=(ShownReply("x", "b"),)),) * 200)
    with pytest.raises(ConversationError, match="200 turns"):
        next(chatbot.turn("a", full, "hello"))


def test_emotions_are_the_probabilities_of_the_whole_answers(model, processor, clips):
    model.eval()
    found = name_emotion(model, processor, "hello there", clips)
    content = [{"type": kind, **item} for kind, item in clips.items()]
    prepared = processor.prepare([{"role": "user", "content": content}], task="emotion")
    scores = []
    for emotion in EMOTIONS:
        answer = processor.encode_reply(emotion)
        inputs = processor.pad([{**prepared, "input_ids": [*prepared["input_ids"], *answer]}])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
        scores.append(float(logits[range(len(answer)), answer].sum()))
    assert list(found) == list(EMOTIONS)
    np.testing.assert_allclose(list(found.values()), torch.tensor(scores).softmax(0), rtol=1e-3)
    assert len({len(processor.encode_reply(emotion)) for emotion in EMOTIONS}) > 1  # otherwise padding is not tested
    assert name_emotion(model, processor, "hello there", {}) is None


def test_what_is_written_is_shown_as_text():
    evil = "<script>alert(1)</script> ${alert(1)} {{value}} `x`"
    page = render_conversation(
        ShownConversation((ShownTurn(evil, answers=(ShownReply(evil, evil, 1.0), ShownReply(evil, evil, 1.0))),))
    )
    assert "<script" not in page and not set("${`") & set(page.replace('class="', ""))
    assert page.count("&lt;script&gt;") == 5


def test_examples_end_with_a_clip(tmp_path, clip):
    with pytest.raises(ValueError, match="no examples"):
        read_examples(tmp_path)
    (tmp_path / "a.mp4").write_bytes(Path(clip).read_bytes())
    row = '{"dialogue_id": "%s", "split": "test", "turn": %d, "speaker": "%s", "text": "t%d", "video": %s}\n'
    lines = [row % ("d", i, ("user", "assistant")[i % 2], i, '"a.mp4"' if i == 2 else "null") for i in range(4)]
    lines += [row % ("e", 0, "assistant", 0, "null")]
    (tmp_path / "metadata.jsonl").write_text("".join(lines))
    (example,) = read_examples(tmp_path)
    assert example.text == "t2" and example.clip == tmp_path / "a.mp4"
    assert [message["content"] for message in example.conversation.messages()] == ["t0", "t1"]


# ---------------------------------------------------------------------------------------------------------- uploads


def test_uploads_are_decoded_as_the_model_takes_them(tmp_path, write_media, grey_frames, tone, clip):
    from empathic.media_empathic import read_audio, read_video

    found = read_upload(clip, ("audio", "video"), 2, Limits())
    assert (found["video"]["video"] == read_video(clip, 2)).all()
    assert (found["audio"]["audio"] == read_audio(clip)).all() and found["audio"]["sampling_rate"] == 16000
    assert set(read_upload(clip, ("audio",), 2, Limits())) == {"audio"}
    # A browser recording: no length in its header, no audio.
    silent = write_media(tmp_path / "silent.webm", frames=grey_frames(8, 600, 800), video_codec="libvpx")
    found = read_upload(str(silent), ("audio", "video"), 2, Limits())
    assert set(found) == {"video"} and found["video"]["video"].shape == (2, 512, 683, 3)
    with pytest.raises(UploadError, match=r"silent.webm has no audio"):
        read_upload(str(silent), ("audio",), 2, Limits())


def test_bad_uploads_get_a_clear_message(tmp_path, write_media, tone, clip):
    def refused(path, message, **limits):
        with pytest.raises(UploadError, match=message) as caught:
            read_upload(str(path), ("audio", "video"), 2, Limits(**limits))
        assert str(tmp_path) not in str(caught.value)  # the message does not show server paths

    cut = tmp_path / "cut.mp4"
    cut.write_bytes(Path(clip).read_bytes()[:3000])
    refused(cut, "cut.mp4: the mp4 file is cut short")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    refused(noise, "noise.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("#EXTM3U\nfile:///etc/passwd\n" * 9)
    refused(text, "is a text file")
    huge = tmp_path / "huge.mp4"
    with open(huge, "wb") as file:
        file.truncate(2 << 30)
    refused(huge, r"2,147.5 MB; the limit is 32 MB")
    long = write_media(tmp_path / "long.wav", samples=tone(600, 8000), sampling_rate=8000, audio_codec="pcm_s16le")
    refused(long, r"long.wav is 600 s long; the limit is 60 s")
    hidden = write_media(  # no length in the header
        tmp_path / "hidden.aac", samples=tone(70, 8000), sampling_rate=8000, format="adts"
    )
    refused(hidden, r"hidden.aac is 7\d s long")
    refused(tmp_path / "gone.mp4", "no longer on the server")
    with pytest.raises(UploadError, match=r"100,000 characters; the limit is 4,000"):
        Limits().check_text("a" * 100_000)


def test_a_file_that_hangs_is_given_up(tmp_path):
    pipe = tmp_path / "clip.mp4"
    os.mkfifo(pipe)  # reading it never ends
    with pytest.raises(UploadError, match=r"clip.mp4 could not be read within 2 s"):
        read_upload(str(pipe), ("video",), 2, Limits(decode_seconds=2))


def test_only_uploads_are_deleted(tmp_path):
    inside, outside = tmp_path / "cache" / "hash" / "a.mp4", tmp_path / "b.mp4"
    inside.parent.mkdir(parents=True)
    for path in (inside, outside):
        path.write_text("x")
    link = tmp_path / "cache" / "link.mp4"
    link.symlink_to(outside)
    for path in (inside, outside, link, None):
        discard(path and str(path), str(tmp_path / "cache"))
    assert not inside.parent.exists() and outside.exists() and (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def served(checkpoint, monkeypatch, tmp_path):
    """A page in this process: its address and its upload folder."""
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`).")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    from empathic.demo.app import Page

    page = Page(Chatbot(checkpoint, max_new_tokens=NEW), Limits(megabytes=0.5, seconds=5))
    page.launch(prevent_thread_lock=True, quiet=True)
    yield page.blocks.local_url, tmp_path / "uploads"
    page.blocks.close(verbose=False)


def test_programs_talk_to_it(served, checkpoint, clip, tmp_path, write_media, tone):
    from gradio_client import Client, handle_file

    url, uploads = served
    client = Client(url, verbose=False)
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/reply", "/emotion"}
    first = client.predict("hello there", None, None, None, api_name="/reply")
    pieces = list(client.submit("how are you", None, handle_file(clip), first["conversation"], api_name="/reply"))
    assert len(pieces) > 2 and pieces[-1]["reply"].startswith(pieces[0]["reply"])
    clips = read_upload(clip, ("audio", "video"), 2, Limits())
    said = expected(checkpoint, ["hello there", "how are you"], **clips)
    assert [first["reply"], pieces[-1]["reply"]] == said and pieces[-1]["memory_vectors"] == 2
    emotions = client.predict("", handle_file(clip), None, api_name="/emotion")
    assert sum(emotions.values()) == pytest.approx(1)

    def refused(message, *given):
        with pytest.raises(Exception, match=message):
            client.predict(*given, api_name="/reply")

    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(clip).read_bytes()[:3000])
    long = write_media(tmp_path / "long.wav", samples=tone(20, 8000), sampling_rate=8000, audio_codec="pcm_s16le")
    large = tmp_path / "large.wav"
    large.write_bytes(os.urandom(600_000))
    refused("100,000 characters", "a" * 100_000, None, None, None)
    refused("cut short", "hello", None, handle_file(broken), None)
    refused("20 s long; the limit is 5 s", "hello", handle_file(long), None, None)
    refused("exceeds the maximum file size", "hello", handle_file(large), None, None)
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": large.read_bytes()})  # past the client's own check
    assert answer.status_code == 413
    refused("URLs are not fetched", "hello", handle_file("https://example.org/a.wav"), None, None)
    link = {"path": "https://example.org/a.json", "meta": {"_type": "gradio.FileData"}}
    refused("URLs are not fetched", "hello", None, None, link)
    refused("not a conversation saved by this page", "hello", None, None, {"turns": []})
    assert client.predict("hello there", None, None, None, api_name="/reply")["reply"] == said[0]
    assert [path for path in uploads.rglob("*") if path.is_file()] == []


def test_eight_programs_at_once_get_their_own_replies(served, checkpoint):
    from gradio_client import Client

    url, _ = served
    words = "hello there how are you i am fine".split()
    results = {}

    def talk(number):
        client, conversation, replies = Client(url, verbose=False), None, []
        for text in (words[number], words[-number - 1]):
            result = client.predict(text, None, None, conversation, api_name="/reply")
            conversation = result["conversation"]
            replies.append(result["reply"])
        results[number] = ([turn["text"] for turn in conversation["turns"]], replies)
        client.close()

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number in range(8):
        said = [words[number], words[-number - 1]]
        assert results[number] == (said, expected(checkpoint, said))


# ------------------------------------------------------------------------------------------------------------ Space


def test_a_space_runs_from_the_hub(base_folder, hub, tmp_path, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra `demo`).")
    import yaml
    from gradio_client import Client
    from hub_server import USER

    from empathic.hub.models import push_model

    space = f"{USER}/talk"
    assert main(["push-space", f"{USER}/tiny", space]) == 1  # the model is not there yet
    assert "me/tiny" in capsys.readouterr().err and not hub.repositories.get(("space", space))
    assert main(["push-space", base_folder, space]) == 1
    assert "Push it with `empathic push`" in capsys.readouterr().err
    push_model(base_folder, f"{USER}/tiny")
    assert main(["push-space", f"{USER}/tiny", space, "--compare", f"{USER}/before"]) == 1
    assert "me/before" in capsys.readouterr().err and not hub.repositories.get(("space", space))
    push_model(base_folder, f"{USER}/before")
    options = ["--compare", f"{USER}/before", "--max_seconds", "7", "--max_new_tokens", "4"]
    assert main(["push-space", f"{USER}/tiny", space, *options]) == 0
    assert f"{hub.url}/spaces/{space}" in capsys.readouterr().out

    files = hub.files(space, type="space")
    card = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py"
    assert card["models"] == [f"{USER}/tiny", f"{USER}/before"]
    needed = files["requirements.txt"].decode()
    assert re.search(r"^transformers[<>=]", needed, re.M) and "pytest" not in needed and "gradio" not in needed
    for name, content in files.items():
        path = tmp_path / "space" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    code = "import app, empathic.chat; print(empathic.chat.__file__, flush=True); app.page.launch(quiet=False)"
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path / "space", env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        printed = ""
        while "http://" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        assert printed.startswith(str(tmp_path / "space"))  # it needs no installed package
        client = Client(re.search(r"http://\S+", printed)[0], verbose=False)
        parts = {part["props"].get("elem_id"): part["props"] for part in client.config["components"]}
        assert "Model: tiny." in parts["head"]["value"]
        names = ["tiny, without voice and face", "tiny, without memory", "before"]
        assert [label for label, _ in parts["compare"]["choices"]] == names
        assert client.predict("hello there", None, None, None, api_name="/reply")["conversation"]["turns"]
        client.close()
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()

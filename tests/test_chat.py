"""Conversations with memory, from Python and in a real terminal process."""

import subprocess
import sys

import pytest
import torch

from empathic.chat import ChatSession
from empathic.media_empathic import MediaError

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def session(model, processor):
    return ChatSession(model.eval(), processor)


def test_replies_are_those_of_the_whole_history_at_once(session, model, processor, clip):
    turns = ["hello there", "how are you", "what did he say"]
    for turn in turns:
        session.reply(turn, video=clip, **GREEDY)
    expected = []
    for k in range(len(turns)):
        content = [{"type": "video", "path": clip}, {"type": "text", "text": turns[k]}]
        messages = [*session.messages[: 2 * k], {"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert ("memory_input_ids" in inputs) == (k > 0)
        output = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(output, skip_special_tokens=True).strip())
    assert [message["content"] for message in session.messages[1::2]] == expected
    assert len(session.vectors) == 2 * len(turns)


def test_an_error_leaves_the_session_as_it_was(session, tmp_path):
    session.reply("hello there", **GREEDY)
    before = (list(session.messages), session.vectors.clone(), session.state.state_dict())
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(MediaError, match=r"empty\.mp4"):
        session.reply("how are you", video=str(empty), **GREEDY)
    with pytest.raises(ValueError, match="last message is empty"):
        session.reply("")
    assert session.messages == before[0] and torch.equal(session.vectors, before[1])
    for name, tensor in session.state.state_dict().items():
        assert torch.equal(tensor, before[2][name])


def test_save_and_load_go_on_alike(session, model, processor, tmp_path):
    session.reply("hello there", **GREEDY)
    session.save(str(tmp_path / "conversation"))
    loaded = ChatSession.load(str(tmp_path / "conversation"), model, processor)
    assert loaded.messages == session.messages
    assert loaded.reply("how are you", **GREEDY) == session.reply("how are you", **GREEDY)
    assert torch.equal(loaded.vectors, session.vectors)


def test_a_system_prompt_replaces_the_default(model, processor):
    session = ChatSession(model, processor, system="the old dog")
    seen = []
    original = processor.apply_chat_template
    processor.apply_chat_template = lambda messages, **kwargs: seen.append(messages) or original(messages, **kwargs)
    try:
        session.reply("hello", **GREEDY)
    finally:
        del processor.apply_chat_template
    assert seen[0][0] == {"role": "system", "content": "the old dog"}


def test_talking_in_the_terminal(base_folder, clip, tmp_path):
    saved = tmp_path / "conversation"
    lines = ["hello there", f"/clip {clip}", "how are you", "/audio nowhere.wav", "/hum", f"/save {saved}", "/new"]
    run = subprocess.run(
        [sys.executable, "-m", "empathic.cli", "chat", base_folder, "--max_new_tokens", "4"],
        input="\n".join([*lines, f"/load {saved}", "fine thanks", "/quit"]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("bot: ") == 3
    assert "There is no file 'nowhere.wav'" in run.stdout and "There is no command /hum" in run.stdout
    assert saved.exists()

"""The Space's chatbot on ZeroGPU, with a stand-in for its package: what goes to and comes from a call is pickled, as on
the way to ZeroGPU's worker processes, and GPU work outside of a call is an error."""

import inspect
import pickle
import types

import pytest

from empathic import emotions
from empathic.chat import ChatSession
from empathic.demo import zero_gpu
from empathic.demo.session import Chatbot, NamedModel, ShownConversation, Stopped
from empathic.demo.uploads import Limits, read_upload

NEW = 6  # tokens of a reply


def copied(value):
    return pickle.loads(pickle.dumps(value))


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that asked for a GPU, each with whether it still has it."""
    calls, has_gpu = [], [False]

    def gpu(duration):
        assert 0 < duration <= 120  # longer calls wait longer

        def decorate(task):
            def states(*args):
                calls.append(task.__name__)
                generator = task(*copied(args))
                try:
                    while True:
                        has_gpu[0] = True
                        try:
                            state = next(generator)
                        except StopIteration:
                            return
                        finally:
                            has_gpu[0] = False
                        yield copied(state)
                finally:
                    calls.append("released")
                    generator.close()

            def value(*args):
                calls.append(task.__name__)
                has_gpu[0] = True
                try:
                    return copied(task(*copied(args)))
                finally:
                    has_gpu[0] = False

            return states if inspect.isgeneratorfunction(task) else value

        return decorate

    monkeypatch.setattr(zero_gpu, "spaces", types.SimpleNamespace(GPU=gpu))
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    calls.append(has_gpu)
    return calls


@pytest.fixture
def checkpoint(model, processor, calls):
    """The model may only run while there is a GPU."""
    has_gpu = calls.pop(0)

    def check(*_):
        assert has_gpu[0], "the model runs outside of a call that has a GPU"

    handles = [model.model.language_model.register_forward_pre_hook(check)]
    handles.append(model.model.memory.mamba.register_forward_pre_hook(check))
    checkpoint = NamedModel("tiny", model.eval(), processor)
    yield checkpoint, has_gpu
    for handle in handles:
        handle.remove()


def test_a_conversation_on_zerogpu_is_that_of_other_hardware(checkpoint, calls, clip):
    named, has_gpu = checkpoint
    chatbot = zero_gpu.chatbot_class()(named, max_new_tokens=NEW)
    assert isinstance(chatbot, zero_gpu.ZeroGPUChatbot)
    clips = read_upload(clip, ("audio", "video"), 2, Limits())
    conversation, states = ShownConversation(), []
    for text, given in (("hello there", clips), ("how are you", {})):
        states = list(chatbot.turn("a", conversation, text, given, compare=("without_memory",)))
        conversation = conversation.plus(states[-1])
    assert len(states) > 4 and len(states[-1].answers) == 2
    assert calls == ["_states", "released"] * 2
    assert chatbot._visitors["a"].sessions == {}  # nothing of the model stays in the page's process
    assert chatbot.clips_of_last("a", conversation) == {}
    found = chatbot.emotions("", clips)
    assert calls[-1] == "emotions"

    has_gpu[0] = True
    session = ChatSession(named.model, named.processor)
    wanted = [session.reply("hello there", **clips, max_new_tokens=NEW, do_sample=False)]
    wanted.append(session.reply("how are you", max_new_tokens=NEW, do_sample=False))
    assert [turn.answers[0].text for turn in conversation.turns] == wanted
    assert found == emotions.name_emotion(named.model, named.processor, "", clips)


def test_a_stopped_turn_gives_the_gpu_back(checkpoint, calls):
    chatbot = zero_gpu.chatbot_class()(checkpoint[0], max_new_tokens=NEW)
    states = chatbot.turn("a", ShownConversation(), "hello there")
    next(states)
    next(states)
    chatbot.stop("a")
    with pytest.raises(Stopped):
        next(states)
    assert calls == ["_states", "released"]


def test_other_hardware_has_the_ordinary_chatbot(calls, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "false")
    assert zero_gpu.chatbot_class() is Chatbot
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setattr(zero_gpu, "spaces", None)
    assert zero_gpu.chatbot_class() is Chatbot

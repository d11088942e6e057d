"""Whole turns of a `ChatSession`, beside those of one that has to read the history first."""

import copy

import torch

from empathic.benchmarks.efficiency_arms import Meter
from empathic.chat import ChatSession


def session_at(model, processor, messages: list[dict], reply: int) -> ChatSession:
    """
    A session in the middle of a conversation: it was given all but the last two of the earlier utterances at once, and
    has then answered a turn, so that it keeps what a session keeps.
    """
    session = ChatSession(model, processor)
    session.remember(*messages[:-3])
    session.reply(messages[-3]["content"], min_new_tokens=reply, max_new_tokens=reply)
    return session


@torch.inference_mode()
def measure_turns(
    model, processor, conversations: dict[int, list[dict]], reply: int, repeats: int
) -> dict[int, dict[str, float]]:
    """
    Seconds of whole turns: the prompt, a reply of `reply` tokens, and remembering both.

    Args:
        conversations: {utterances before the turn: messages}, at least two utterances each.

    Returns:
        {utterances: `streaming` (a running session), `anew` (a new session that is given the history first, as a stop
        and start would without a saved state), `encoding` (of the history alone), `reading` (of its last two
        utterances, into the carried state), and the `new_positions` of the streaming turn}.
    """
    meter, sessions, runs, results = Meter(model), {}, {}, {}
    for turns, messages in conversations.items():
        sessions[turns] = session_at(model, processor, messages, reply)
        history, text = sessions[turns].messages, messages[-1]["content"]
        rows = [processor.encode_utterance(m["role"], m["content"]) for m in history]
        read, last = torch.tensor([[i for row in rows for i in row]], device=model.device), sum(map(len, rows[-2:]))
        length = {"min_new_tokens": reply, "max_new_tokens": reply}

        def streaming(session=sessions[turns], text=text, length=length):
            turn = copy.copy(session)  # a session replaces what it knows as a whole: the original stays where it is
            turn.reply(text, **length)
            return turn.last_turn

        def anew(history=history, text=text, length=length):
            session = ChatSession(model, processor)
            session.remember(*history)
            session.reply(text, **length)

        runs[turns, "streaming"], runs[turns, "anew"] = streaming, anew

        def reading(state=sessions[turns].state, last=read[:, -last:]):
            model.append_to_memory(state.fork(), last)

        runs[turns, "encoding"] = lambda read=read: model.get_memory_features(read)
        runs[turns, "reading"] = reading
        results[turns] = {"new_positions": streaming().new_positions}
    for (turns, name), seconds in meter.alternate(runs, repeats).items():
        results[turns][name] = seconds
    return results

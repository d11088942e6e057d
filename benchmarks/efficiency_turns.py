"""Time whole turns of a running `ChatSession`, compared with a new session that must encode the history first."""

import copy

import torch

from ..chat import ChatSession
from .efficiency_arms import CostMeter


def session_at(model, processor, messages: list[dict], reply: int) -> ChatSession:
    """
    Return a session in the middle of a conversation: it has read all but the last two of the earlier utterances at
    once and has then answered a turn, so that its caches are filled.
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
    Measure the seconds of whole turns: the prompt, a reply of `reply` tokens, and remembering both.

    Args:
        conversations: {utterances before the turn: messages}, at least two utterances each.

    Returns:
        {utterances: seconds of `streaming` (turn of a running session), `anew` (turn of a new session that first reads
        the history, as after a restart without a saved state), `encoding` (encoding the history only), `reading`
        (adding its last two utterances to the memory state), and the `new_positions` of the streaming turn}.
    """
    meter, sessions, runs, results = CostMeter(model), {}, {}, {}
    for turns, messages in conversations.items():
        sessions[turns] = session_at(model, processor, messages, reply)
        history, text = sessions[turns].messages, messages[-1]["content"]
        rows = [processor.encode_utterance(m["role"], m["content"]) for m in history]
        read, last = torch.tensor([[i for row in rows for i in row]], device=model.device), sum(map(len, rows[-2:]))
        length = {"min_new_tokens": reply, "max_new_tokens": reply}

        def streaming(session=sessions[turns], text=text, length=length):
            turn = copy.copy(session)  # a turn replaces the session's attributes: the original stays unchanged
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

"""Time whole turns of a running `ChatSession`, compared with a new session that must encode the history first."""

import copy

import torch
from transformers import DynamicCache

from ..chat import ChatSession
from ..compat_empathic import CACHE
from ..decoding import fork
from .efficiency_arms import CostMeter


def session_at(model, processor, messages: list[dict], reply: int) -> ChatSession:
    """
    Return a session in the middle of a conversation: it has read all but the last two of the earlier utterances at
    once and has then answered a turn, so that its caches are filled.
    """
    session = ChatSession(model, processor)
    session.remember(*messages[:-3])
    session.reply(messages[-3]["content"], **exactly(reply))
    return session


def exactly(tokens: int) -> dict:
    """Arguments of `generate` for a reply of this many tokens: no token ends it, and nothing is computed for that."""
    return {"max_new_tokens": tokens, "eos_token_id": 1 << 30, "pad_token_id": 0}


def language_model_alone(model, positions: int, reused: int, reply: int):
    """
    Return a function that runs the language model alone as a turn does: over `positions` new positions after `reused`
    cached ones, then over one position at a time for the other tokens of a reply of `reply` tokens, with its head.
    """
    decoder, width = model.model.language_model, model.config.text_config.hidden_size
    embeddings = torch.randn(1, reused + positions, width, device=model.device, dtype=model.dtype)
    kept = DynamicCache(config=model.config.text_config)
    if reused:
        decoder(inputs_embeds=embeddings[:, :reused], use_cache=True, **{CACHE: kept})

    def run():
        cache = fork(kept, reused)
        hidden = decoder(inputs_embeds=embeddings[:, reused:], use_cache=True, **{CACHE: cache}).last_hidden_state
        for token in range(reply):
            model.lm_head(hidden[:, -1:])
            if token < reply - 1:
                step = embeddings[:, :1]
                hidden = decoder(inputs_embeds=step, use_cache=True, **{CACHE: cache}).last_hidden_state

    return run


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
        (adding its last two utterances to the memory state), `model` (the language model alone over the positions of
        the streaming turn and of its reply), and the `new_positions` of the streaming turn}.
    """
    meter, sessions, runs, results = CostMeter(model), {}, {}, {}
    for turns, messages in conversations.items():
        sessions[turns] = session_at(model, processor, messages, reply)
        history, text = sessions[turns].messages, messages[-1]["content"]
        rows = [processor.encode_utterance(m["role"], m["content"]) for m in history]
        read, last = torch.tensor([[i for row in rows for i in row]], device=model.device), sum(map(len, rows[-2:]))

        def streaming(session=sessions[turns], text=text):
            turn = copy.copy(session)  # a turn replaces the session's attributes: the original stays unchanged
            turn.reply(text, **exactly(reply))
            return turn.last_turn

        def anew(history=history, text=text):
            session = ChatSession(model, processor)
            session.remember(*history)
            session.reply(text, **exactly(reply))

        runs[turns, "streaming"], runs[turns, "anew"] = streaming, anew

        def reading(state=sessions[turns].state, last=read[:, -last:]):
            model.append_to_memory(state.fork(), last)

        runs[turns, "encoding"] = lambda read=read: model.get_memory_features(read)
        runs[turns, "reading"] = reading
        cost = streaming()
        runs[turns, "model"] = language_model_alone(model, cost.new_positions, cost.reused_positions, reply)
        results[turns] = {"new_positions": cost.new_positions}
    for (turns, name), seconds in meter.alternate(runs, repeats).items():
        results[turns][name] = seconds
    return results

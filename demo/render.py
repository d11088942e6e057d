"""Render turns as HTML. Text from visitors and models is untrusted and always escaped."""

import html

from .session import ShownConversation, ShownReply, ShownTurn

SHOWN_REPLIES = {(): "", ("audio",): "with voice", ("video",): "with face", ("audio", "video"): "with voice and face"}
# Gradio treats HTML values as templates, so these characters must be escaped.
TEMPLATE_CHARACTERS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})
WELCOME = (
    '<p class="empty">Say something: write it, record your voice, or add a webcam clip or a file. '
    "The reply depends on how you say it.</p>"
)


def plain(text: str) -> str:
    """Escape a text for HTML and for Gradio's templates."""
    return html.escape(text).translate(TEMPLATE_CHARACTERS)


def render_conversation(conversation: ShownConversation) -> str:
    """Render all finished turns."""
    return "".join(render_turn(turn) for turn in conversation.turns) or WELCOME


def render_turn(turn: ShownTurn, writing: bool = False) -> str:
    """
    Render a turn: what the visitor said, the recognized emotion and the cost beside it, and the answers below.

    Args:
        turn: the turn.
        writing: whether the turn is still being answered.
    """
    text = f"<p>{plain(turn.text)}</p>" if turn.text else ""
    shown = f'<p class="shown">{SHOWN_REPLIES[turn.shown]}</p>' if turn.shown else ""
    first = turn.answers[0] if turn.answers else None
    aside = _emotions(turn) + _cost(turn, first)
    compared = len(turn.answers) > 1
    answers = "".join(_answer(answer, compared, writing and answer is turn.answers[-1]) for answer in turn.answers)
    if not turn.answers and writing:
        answers = '<div class="answer waiting">reading …</div>'
    return (
        f'<article class="turn"><div class="said">{text}{shown}</div><div class="read">{aside}</div>'
        f'<div class="answers">{answers}</div></article>'
    )


def render_notice(message: str, error: bool = False) -> str:
    """Render a message to the visitor; an empty message gives an empty string."""
    if not message:
        return ""
    kind, role = ("error", "alert") if error else ("info", "status")
    return f'<p class="notice {kind}" role="{role}">{plain(message)}</p>'


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _emotions(turn: ShownTurn) -> str:
    if turn.emotions is None:
        return ""
    best = max(turn.emotions, key=turn.emotions.get)
    rows = "".join(
        f'<li{" class=best" if name == best else ""}><span class="name">{name}</span>'
        f'<span class="track" aria-hidden="true"><span class="bar" style="width:{100 * value:.1f}%"></span></span>'
        f'<span class="value">{_percent(value)}</span></li>'
        for name, value in turn.emotions.items()
    )
    return f'<p class="emotion">recognized: <b>{best}</b></p><ul class="bars">{rows}</ul>'


def _cost(turn: ShownTurn, first: ShownReply | None) -> str:
    if first is None or first.seconds is None:
        return ""
    tokens, vectors = first.history_tokens, first.memory_vectors
    history = (
        f"history: {vectors} memory vector{'s' * (vectors != 1)} for {tokens} tokens of text"
        if tokens
        else "no history yet"
    )
    if tokens and not vectors:
        history = f"history left out ({tokens} tokens of text)"
    seconds = f"reply in {first.seconds:.2f} s"
    if turn.emotions is not None and turn.emotion_seconds is not None:
        seconds += f", emotion in {turn.emotion_seconds:.2f} s"
    return f'<p class="cost">{history}<br>{seconds}</p>'


def _answer(answer: ShownReply, compared: bool, writing: bool) -> str:
    label = f'<p class="label">{plain(answer.label)}</p>' if compared else ""
    seconds = f" · {answer.seconds:.2f} s" if compared and answer.seconds is not None else ""
    label = label.replace("</p>", f"{seconds}</p>")
    text = plain(answer.text) or ("" if writing else "<i>(no words)</i>")
    return f'<div class="answer{" writing" if writing else ""}">{label}<p>{text}</p></div>'

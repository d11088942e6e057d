"""
The benchmarks' files: long conversations and questions about them.

| benchmark | paper | file |
|---|---|---|
| `locomo` | Maharana et al. 2024, arXiv:2402.17753 | `locomo10.json` |
| `longmemeval` | Wu et al. 2025, arXiv:2410.10813 | `longmemeval_s.json`, `_m`, `_oracle` |
| `es-memeval` | ES-MemEval, emotional support over many sessions | `evo_emo.json` |

An item that cannot be used is left out and named.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# LoCoMo's categories by number, as its paper names them.
LOCOMO_CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open domain", 4: "single-hop", 5: "adversarial"}
ABSTENTION = "abstention"  # LongMemEval's questions about what was never said


@dataclass(frozen=True)
class Said:
    """An utterance: its id in the benchmark, who said it (`role` as in messages), what, and when (empty: unknown)."""

    id: str
    role: str
    name: str | None
    text: str
    date: str = ""


@dataclass(frozen=True)
class Question:
    """
    A question about a conversation.

    Attributes:
        id: identifies it within the benchmark.
        text: the question.
        answer: the answer key; of LoCoMo's adversarial questions the wrong answer that they suggest.
        category: the benchmark's category.
        evidence: ids of the utterances that hold the answer; may be empty.
        date: when it is asked; empty: unknown.
    """

    id: str
    text: str
    answer: str
    category: str
    evidence: tuple[str, ...] = ()
    date: str = ""


@dataclass(frozen=True)
class Conversation:
    """A conversation, in the order of time, and questions about it."""

    id: str
    said: tuple[Said, ...]
    questions: tuple[Question, ...]


@dataclass
class Benchmark:
    """A benchmark's conversations, and what was left out of them: (item, reason)."""

    name: str
    conversations: list[Conversation]
    left_out: list[tuple[str, str]] = field(default_factory=list)


def load_benchmark(path: str | Path, corrections: str | Path | None = None) -> Benchmark:
    """
    Load a benchmark's file, recognized by its keys.

    Args:
        path: the file.
        corrections: for LoCoMo, a JSON list of corrected answer keys, `[{"question_id": "locomo_0_qa5",
            "correct_answer": ..., "correct_evidence": [...]}]`, as the audit at github.com/dial481/locomo-audit
            publishes them (`errors.json`). A question is named by the places of its conversation and of itself.

    Raises:
        ValueError: if the file is none of these benchmarks, or has no question that can be used.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}). Give the benchmark's file.") from None
    first = content[0] if isinstance(content, list) and content and isinstance(content[0], dict) else {}
    for keys, load in LOADERS.items():
        if set(keys) <= set(first):
            if corrections is not None and load is not load_locomo:
                raise ValueError("corrections are those of LoCoMo. Leave them out for another benchmark.")
            found = load(content, *([] if corrections is None else [_corrections(corrections)]))
            break
    else:
        raise ValueError(
            f"{path} is none of the benchmarks: LoCoMo has the keys `qa` and `conversation`, LongMemEval "
            "`haystack_sessions`, ES-MemEval `dialog_history`."
        )
    if not any(conversation.questions for conversation in found.conversations):
        reasons = "; ".join(f"{item}: {reason}" for item, reason in found.left_out[:3])
        raise ValueError(f"{path} has no question that can be used. {reasons}")
    return found


def _corrections(path: str | Path) -> dict[str, dict]:
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return {entry["question_id"]: entry for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no list of corrections ({type(error).__name__}: {error}). Give a JSON list of objects with "
            "`question_id` and `correct_answer`."
        ) from None


def _text(value) -> str:
    """A text of a file as a string without white space around it; numbers occur as answers."""
    return "" if value is None else str(value).strip()


def load_locomo(content: list[dict], corrections: Mapping[str, dict] | None = None) -> Benchmark:
    """Read LoCoMo. A shared picture is told by its caption, as in the benchmark."""
    found = Benchmark("locomo", [])
    for number, entry in enumerate(content):
        name, talk, said = _text(entry.get("sample_id")) or f"conv-{number}", entry["conversation"], []
        sessions = [key for key in talk if re.fullmatch(r"session_\d+", key)]
        for key in sorted(sessions, key=lambda key: int(key.split("_")[1])):
            for turn in talk[key]:
                caption = _text(turn.get("blip_caption"))
                text = " ".join(filter(None, [_text(turn.get("text")), f"[shares {caption}]" if caption else ""]))
                if not text:
                    found.left_out.append((f"{name} {turn.get('dia_id')}", "the turn has no text"))
                    continue
                role = "user" if turn["speaker"] == talk["speaker_a"] else "assistant"
                said.append(Said(turn["dia_id"], role, turn["speaker"], text, _text(talk.get(f"{key}_date_time"))))
        ids, questions = {turn.id for turn in said}, []
        for place, qa in enumerate(entry["qa"]):
            corrected = (corrections or {}).get(f"locomo_{number}_qa{place}", {})
            category = LOCOMO_CATEGORIES.get(qa.get("category"))
            # Some questions of the other categories have an answer under the key of the adversarial ones too.
            answer = _text(qa.get("adversarial_answer" if category == "adversarial" else "answer"))
            answer = _text(corrected.get("correct_answer")) or answer or _text(qa.get("answer"))
            if category is None or not answer or not _text(qa.get("question")):
                found.left_out.append((f"{name} question {place}", "no question, no answer or an unknown category"))
                continue
            listed = corrected.get("correct_evidence") or qa.get("evidence") or []
            # Some entries hold several ids, some have leading zeros.
            found_ids = re.findall(r"D(\d+):(\d+)", " ".join(map(str, listed)))
            evidence = [f"D{int(session)}:{int(place)}" for session, place in found_ids]
            missing = [one for one in evidence if one not in ids]
            if missing or (listed and not evidence):
                found.left_out.append((f"{name} question {place}", f"evidence that is no turn: {listed}"))
            evidence = tuple(dict.fromkeys(one for one in evidence if one in ids))
            questions.append(Question(f"{name}:{place}", _text(qa["question"]), answer, category, evidence))
        found.conversations.append(Conversation(name, tuple(said), tuple(questions)))
    return found


def load_longmemeval(content: list[dict]) -> Benchmark:
    """Read LongMemEval, in which each question has a history of its own. Its sessions are sorted by time."""
    found = Benchmark("longmemeval", [])
    for number, entry in enumerate(content):
        name = _text(entry.get("question_id")) or f"question-{number}"
        if not _text(entry.get("question")) or not _text(entry.get("answer")):
            found.left_out.append((name, "no question or no answer"))
            continue
        parts = (entry["haystack_dates"], entry["haystack_session_ids"], entry["haystack_sessions"])
        sessions = sorted(zip(*parts, strict=True), key=lambda session: session[0])  # dates are written year first
        said, evidence = [], []
        for date, session, turns in sessions:
            for place, turn in enumerate(turns):
                if turn.get("role") not in ("user", "assistant") or not _text(turn.get("content")):
                    found.left_out.append((f"{name} {session}:{place}", "the turn has no text or no role"))
                    continue
                said.append(Said(f"{session}:{place}", turn["role"], None, _text(turn["content"]), _text(date)))
                if turn.get("has_answer"):
                    evidence.append(said[-1].id)
        category = ABSTENTION if name.endswith("_abs") else _text(entry.get("question_type"))
        asked = _text(entry["question"]), _text(entry["answer"]), category
        question = Question(name, *asked, tuple(evidence), _text(entry.get("question_date")))
        found.conversations.append(Conversation(name, tuple(said), (question,)))
    return found


def load_es_memeval(content: list[dict]) -> Benchmark:
    """Read ES-MemEval: the sessions of a seeker of help with a supporter."""
    found = Benchmark("es-memeval", [])
    for number, entry in enumerate(content):
        name, said = _text(entry.get("id")) or f"seeker-{number}", []
        for session in entry["dialog_history"]:
            for turn in session["dialogue"]:
                place = f"{session['id']}:{turn['idx']}"
                if not _text(turn.get("content")):
                    found.left_out.append((f"{name} {place}", "the turn has no text"))
                    continue
                role = "user" if turn["role"] == "seeker" else "assistant"
                said.append(Said(place, role, turn["role"], _text(turn["content"]), _text(session.get("timestamp"))))
        ids, questions = {turn.id for turn in said}, []
        for group in entry.get("questions") or []:
            for asked in group["questions"]:
                place = f"{name}:{group.get('id')}:{asked.get('idx')}"
                if not _text(asked.get("question")) or not _text(asked.get("answer")):
                    found.left_out.append((place, "no question or no answer"))
                    continue
                evidence = tuple(one for one in map(_text, asked.get("evidence") or []) if one in ids)
                text, answer, category = (_text(asked.get(key)) for key in ("question", "answer", "capability"))
                questions.append(Question(place, text, answer, category, evidence))
        found.conversations.append(Conversation(name, tuple(said), tuple(questions)))
    return found


LOADERS = {
    ("qa", "conversation"): load_locomo,
    ("haystack_sessions", "question_id"): load_longmemeval,
    ("dialog_history", "questions"): load_es_memeval,
}

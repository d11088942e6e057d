"""The replies that quickstart has made, scored and saved as `empathic evaluate dialogue` would, for the report."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from empathic.data_prep.candidates import message_text
from empathic.evaluation.published import SOURCE, TABLE_1
from empathic.evaluation.results import versions, write_results
from empathic.evaluation.scores import Scoring, score_replies
from empathic.trainers.samples import sample_id


def write_scored_replies(
    folder: str | Path,
    samples: Sequence[dict],
    replies: Mapping[str, Sequence[str]],
    scoring: Scoring,
    *,
    settings: Mapping,
    systems: Mapping[str, Mapping],
    baseline: str,
) -> dict:
    """
    Writes dialogue.json, and dialogue/NUMBER.jsonl with the replies of each system.

    Args:
        folder: made if it is not there.
        samples: of `DialogueSamples`.
        replies: {system: as many texts as samples}.
        scoring: what is computed.
        settings: of the whole: `data` and `split`, and what else decided the replies.
        systems: {system: its settings}.
        baseline: system that the others are compared with.

    Returns:
        what dialogue.json holds.
    """
    folder = Path(folder)
    (folder / "dialogue").mkdir(parents=True, exist_ok=True)
    rows, files = {}, {}
    for number, (name, texts) in enumerate(replies.items()):
        rows[name] = [_row(sample, text) for sample, text in zip(samples, texts, strict=True)]
        files[name] = f"dialogue/{number}.jsonl"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[name])
        (folder / files[name]).write_text(lines, encoding="utf-8")
    found = score_replies(rows, scoring, [(name, baseline) for name in replies if name != baseline])
    for name, system in found["systems"].items():
        system |= {"settings": dict(systems[name]), "replies": files[name]}
    corpora = dict(Counter(sample["corpus"] for sample in samples))
    results = {
        "table": "dialogue",
        **found,
        "baseline": baseline,
        "settings": {
            **settings,
            "corpora": corpora,
            "seed": scoring.seed,
            "confidence": scoring.confidence,
            "resamples": scoring.resamples,
            "interval": "bootstrap over conversations (BCa)",
        },
        "versions": versions(),
        "published": {"source": SOURCE, "rows": {name: rows for name, rows in TABLE_1.items() if name in corpora}},
    }
    write_results(folder / "dialogue.json", results)
    return results


def _row(sample: Mapping, text: str) -> dict:
    *earlier, last = sample["prompt"]
    prompt = [{**message, "content": message_text(message)} for message in earlier]
    clips = [{"type": part["type"], "path": part["path"]} for part in _parts(last) if part.get("path")]
    prompt.append({**last, "content": [*clips, {"type": "text", "text": message_text(last)}]})
    about = {"reply": text, "reference": sample["reply"], "emotion": sample["emotion"]}
    return {"id": sample_id(sample), "prompt": prompt, **about}


def _parts(message: Mapping) -> list[Mapping]:
    return [] if isinstance(message["content"], str) else message["content"]

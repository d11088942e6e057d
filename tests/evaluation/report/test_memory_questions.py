"""Answers to questions about long conversations in the report."""

import json

from empathic.evaluation.report.build import MARKDOWN, write_report


def test_the_arms_stand_beside_each_other(tmp_path):
    row = {
        "f1": {"all": 0.25, "temporal": 0.5},
        "evidence_recall": {"all": 1.0, "temporal": None},
        "questions": {"all": 4, "temporal": 2},
        "positions": 512,
        "new_positions": 20,
        "seconds": 0.5,
        "reading_seconds": 3.0,
        "held_bytes": 2**21,
    }
    results = {
        "model": "m", "data": "locomo10.json", "benchmark": "locomo", "retriever": "r", "conversations": 1,
        "all_questions": 9, "arms": {"full": row, "memory": {**row, "positions": 77}}, "settings": {"top_k": 3},
    }  # fmt: skip
    (tmp_path / "memory.json").write_text(json.dumps(results), encoding="utf-8")
    write_report([str(tmp_path)])
    text = (tmp_path / MARKDOWN).read_text(encoding="utf-8")
    assert "Long conversations: locomo" in text and "4 of 9 questions about 1 conversations" in text
    assert "| full | 0.250 | 0.500 |" in text and "| memory | 1.000 | – |" in text
    assert "| memory | 77 | 20 | 0.5 | 3 | 2 |" in text

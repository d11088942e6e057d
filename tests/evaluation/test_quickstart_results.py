"""EPO beside its control over several seeds."""

import numpy as np
import pytest

from empathic.evaluation.quickstart_results import compare_seeds

FEELINGS = {"hooray, rex": [1.0, 0.0], "i see": [0.6, 0.8], "sorry": [0.0, 1.0], "sorry, rex": [0.0, 1.0]}


class Features:
    def encode(self, texts):
        return np.array([FEELINGS[text] for text in texts])


def outcome(*replies, **row):
    sampled = ["i see", *replies[1:]]
    return {"replies": list(replies), "sampled": sampled, "row": {**row, "emotion_score_sampled": 0.5}}


def test_seeds_are_averaged_and_samples_paired():
    samples = [
        {"corpus": "c", "split": "test", "dialogue_id": name, "turn": 1, "reply": reply, "prompt": []}
        for name, reply in (("a", "hooray, rex"), ("b", "sorry"), ("c", "sorry"))
    ]
    epo = [
        outcome("hooray, rex", "sorry", "sorry", emotion_score=1.0, recall=1.0, margin=3.0),
        outcome("hooray, rex", "i see", "sorry", emotion_score=2.8 / 3, recall=1.0, margin=1.0),
    ]
    control = [outcome("sorry, rex", "hooray, rex", "sorry", emotion_score=1 / 3, recall=1.0, margin=0.0)] * 2
    found = compare_seeds(epo, control, samples, [["rex"], [], ["rex"]], Features())
    score = found["emotion_score"]
    assert score["epo"]["mean"] == pytest.approx((1 + 2.8 / 3) / 2) and score["control"]["sd"] == 0
    assert score["difference"]["value"] == pytest.approx((1 + 0.9 + 0) / 3)
    assert score["difference"]["low"] <= score["difference"]["value"] <= score["difference"]["high"]
    assert score["p_value"] == 0.5  # 4 of the 8 permutations of three conversations, one of which does not differ
    assert found["emotion_score_sampled"]["difference"]["value"] == pytest.approx((0 + 0.9 + 0) / 3)
    assert found["recall"]["difference"]["value"] == 0 and found["recall"]["p_value"] == 1
    assert found["margin"] == {"epo": {"mean": 2.0, "sd": pytest.approx(2**0.5)}, "control": {"mean": 0.0, "sd": 0.0}}

"""The benchmark of the feature cache, at its smallest."""

import json

from empathic.benchmarks import feature_cache


def test_training_from_the_cache_is_timed_beside_training_from_media_and_has_its_losses(tmp_path, capsys):
    file = tmp_path / "feature_cache.json"
    options = ["--output", str(file), "--steps", "2", "--dialogues", "4", "--clips", "tiny", "--draws", "1"]
    result = feature_cache.main(options)
    assert result == json.loads(file.read_text(encoding="utf-8"))
    tiny = result["tiny"]
    assert tiny["clips"] > 4 and tiny["cache_bytes"] > 0
    assert tiny["seconds_a_step"].keys() == {"media", "cache"}
    assert tiny["largest_difference_of_a_loss"] < 1e-4
    assert "tiny: ratio" in capsys.readouterr().out

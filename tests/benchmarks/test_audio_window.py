"""The benchmark of the audio window runs and measures both windows."""

import json

import torch

from empathic.benchmarks import audio_window


def test_both_windows_are_measured_for_each_length(tmp_path, capsys, monkeypatch):
    threads, calls = torch.get_num_threads(), []

    def encode(tower, features, mask, window):
        calls.append((window, int(mask.sum())))

    monkeypatch.setattr(audio_window, "encode_sound", encode)
    options = ["--seconds", "1", "2.5", "--repeats", "2", "--output", str(tmp_path / "new" / "result.json")]
    try:
        monkeypatch.setattr(audio_window.time, "process_time", iter(range(1000)).__next__)
        result = audio_window.main(options)
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == result
    assert [(clip["seconds"], clip["ratio"]) for clip in result["clips"]] == [(1.0, 1.0), (2.5, 1.0)]
    assert calls == [("full", 100), ("clip", 100)] * 3 + [("full", 250), ("clip", 250)] * 3
    assert "2.5 s: full 1000 ms, clip 1000 ms, ratio 1.0" in capsys.readouterr().out

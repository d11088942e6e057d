"""Recall against age: the facts, the merging of old vectors, and the command."""

import json

import pytest
import torch

from empathic.benchmarks import memory_age
from empathic.chat import ChatSession
from empathic.evaluation.metrics import words_of


def test_only_the_telling_has_the_word_that_is_asked_for():
    cases = list(memory_age.facts(12, seed=3))
    assert len(cases) == 12
    for told, turn, answer, others in cases:
        assert [m["role"] for m in told] == ["user", "assistant"] and turn["role"] == "user"
        assert answer in words_of(told[0]["content"]) and answer not in words_of(turn["content"])
        assert len(others) > 1000 and {m["role"] for m in others} == {"user", "assistant"}
    assert len({turn["content"] for _, turn, _, _ in cases}) > 6
    assert list(memory_age.facts(12, seed=3)) == cases


def test_old_vectors_are_merged_and_new_ones_stay():
    vectors = torch.arange(40.0).reshape(10, 4) + 1
    assert torch.equal(memory_age.merge_oldest(vectors, 10), vectors)
    found = memory_age.merge_oldest(vectors, 4)
    assert found.shape == (4, 4) and torch.equal(found[-2:], vectors[-2:])
    mean = vectors[:4].mean(0)
    assert torch.allclose(found[0] / found[0].norm(), mean / mean.norm())
    assert torch.allclose(found[:2].norm(dim=-1), vectors.norm(dim=-1).mean().expand(2))
    assert memory_age.merge_oldest(vectors, 1).shape == (1, 4)


def test_each_way_has_its_vectors(model, processor, monkeypatch):
    messages = [{"role": ("user", "assistant")[i % 2], "content": "how are you"} for i in range(9)]
    turn, seen, generate = {"role": "user", "content": "hello"}, [], model.generate

    def spy(**kwargs):
        seen.append(kwargs["input_ids"][0].tolist())
        return generate(**kwargs)

    monkeypatch.setattr(model.eval(), "generate", spy)
    counts = {}
    for way in memory_age.WAYS:
        memory_age.reply_in(way, model, processor, messages, turn, budget=4, recall=2)
        counts[way] = seen[-1].count(model.config.memory_token_id)
        assert ("said before:" in processor.decode(seen[-1])) == (way == "recalled")
    assert counts == {"no limit": 9, "dropped": 4, "merged": 4, "recalled": 4}
    # Within the budget nothing is merged.
    session = ChatSession(model, processor)
    session.remember(*messages)
    expected = session.reply("hello", do_sample=False, max_new_tokens=32)
    assert memory_age.reply_in("merged", model, processor, messages, turn, budget=9, recall=0) == expected


def test_the_command_writes_all(base_folder, tmp_path, capsys):
    options = ["--ages", "3", "1", "--samples", "1", "--budget", "2", "--output", str(tmp_path)]
    results = memory_age.main([base_folder, *options])
    assert list(results["recalled"]) == list(memory_age.WAYS)
    assert all(list(row) == ["1", "3"] for row in results["recalled"].values())
    assert json.loads((tmp_path / "memory_age.json").read_text())["recalled"] == results["recalled"]
    assert (tmp_path / "memory_age.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "memory_age.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        memory_age.main([base_folder, "--ages", "0"])

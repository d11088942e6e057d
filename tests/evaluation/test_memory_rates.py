"""Scores against vectors per token: names and numbers, groups, and the table."""

import pytest

from empathic.evaluation import memory_rates as m


def test_names_and_numbers_are_found_by_their_spelling():
    texts = [
        "Hello Clara, I met Bob-Ray in Rome.",
        "The train leaves at 7:30, on track twelve!",
        "I am. It is.",
        "paris",
    ]
    assert m.names_and_numbers(texts) == {"clara", "bob-ray", "rome", "7", "30", "twelve"}


def turn(text):
    return {"speaker": "a", "text": text}


def test_utterances_are_grouped_by_their_vectors_per_token(processor):
    turns = [turn("hello"), turn("hello there how are you"), turn("hello there how are you i am fine thanks what")]
    expected = [f"a: {row['text']}" for row in turns]
    answers = [expected[0], "a: hello", expected[2].replace("fine", "what")]
    rows = m.rate_rows(processor, turns, answers, expected, {"hello", "fine", "thanks"}, {"fine"}, groups=3)
    everything, *groups = rows
    assert everything["utterances"] == 3 and [row["utterances"] for row in groups] == [1, 1, 1]
    rates = [row["vectors_per_token"] for row in groups]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(1 / len(processor.encode_plain("a: hello")))
    assert [row["exact"] for row in groups] == [0.0, 0.0, 1.0] and everything["exact"] == pytest.approx(1 / 3)
    assert groups[0]["recall"] == pytest.approx(2 / 3) and groups[0]["names"] == 0.0 and "names" not in groups[1]
    table = m.rate_table(rows).split("\n")
    assert len(table) == 6 and table[2].startswith("| all 3 |") and "names, numbers" in table[0]


def test_one_rate_is_one_row(processor):
    turns = [turn("hello")] * 3
    texts = ["a: hello"] * 3
    assert len(m.rate_rows(processor, turns, texts, texts, {"hello"}, set())) == 1


def test_the_plot_is_drawn_with_those_of_other_checkpoints(tmp_path, processor):
    turns = [turn("hello"), turn("hello there you")]
    texts = [f"a: {row['text']}" for row in turns]
    rows = m.rate_rows(processor, turns, texts, texts, {"hello"}, set())
    m.plot_rates({"one": rows, "other": rows[:1]}, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")

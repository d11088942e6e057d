"""The arms: what their prompts have, that they are those of the processor, and what is processed once."""

import json

import pytest
import torch

from empathic import chat
from empathic.benchmarks.memory_qa import ARMS
from empathic.benchmarks.memory_qa import arms as memory_qa_arms
from empathic.benchmarks.memory_qa.arms import (
    AFTER,
    BEFORE,
    SYSTEM,
    Arms,
    Settings,
    as_turn,
    ask,
    read_choice,
    without_name,
)
from empathic.benchmarks.memory_qa.sources import Question, Said
from empathic.cli import main as cli
from empathic.decoding import first_logits

WORDS = "hello there how are you i am fine thanks what did he say about the old dog of clara".split()


def letters(texts):
    return [[float(text.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def talk(turns):
    return tuple(
        Said(f"t{i}", ("user", "assistant")[i % 2], ("Clara", "Bo")[i % 2], f"{WORDS[i % 19]} {WORDS[i % 7]}",
             f"{1 + i // 4} May")
        for i in range(turns)
    )  # fmt: skip


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that were processed."""
    seen = []

    def spy(model, input_ids, cache, media):
        seen.append(input_ids[0].tolist())
        return first_logits(model, input_ids, cache, media)

    for module in (memory_qa_arms, chat):
        monkeypatch.setattr(module, "first_logits", spy)
    return seen


def build(model, processor, turns=12, asked=("what did he say", "how are you"), embed=letters, **settings):
    settings = Settings(**{"last": 3, "top_k": 2, "max_new_tokens": 4, **settings})
    return Arms(model.eval(), processor, talk(turns), list(asked), settings, embed)


def test_each_arm_has_its_part_of_the_conversation(model, processor, prompts):
    arms, placeholder = build(model, processor), model.config.memory_token_id
    found = {arm: arms.answer(arm, ["what did he say"])[0] for arm in ARMS}
    texts = {}
    for arm in ARMS:
        arms.answer(arm, ["what did he say"])[0]
        texts[arm] = processor.decode(prompts[-1])
        assert SYSTEM in texts[arm] and texts[arm].count(f"{BEFORE}what did he say{AFTER}") == 1
        assert prompts[-1].count(placeholder) == (12 if arm.startswith("memory") else 0)
        assert found[arm].positions == len(prompts[-1])
    said = arms.said
    for turn in said:
        line = f"{turn.name}: {turn.text}\n"
        assert f"] {turn.text}" in texts["full"] or f"{turn.name}: {turn.text}" in texts["full"], line
    assert texts["full"].count("May]") == 3  # the date of each session once
    assert found["full"].shown == found["memory"].shown == {turn.id for turn in said}
    assert found["last"].shown == {"t9", "t10", "t11"}
    near = {said[place].id for place in arms._keys.nearest(torch.tensor(letters(["what did he say"])[0]), 2)}
    assert found["retrieval"].shown == near and found["memory_retrieval"].shown == {turn.id for turn in said}
    for arm in ("retrieval", "memory_retrieval"):
        shown = texts[arm].split("said before:\n")[1].split("\nsentence:")[0].split("\n")
        assert len(shown) == 2 and all("May] " in line for line in shown)
    assert "said before" not in texts["memory"] + texts["full"]
    assert found["memory"].positions < found["full"].positions
    assert found["memory"].held_bytes < found["full"].held_bytes


def test_what_does_not_depend_on_the_question_is_processed_once(model, processor):
    arms = build(model, processor)
    for arm in ARMS:
        first, second = arms.answer(arm, ["what did he say"])[0], arms.answer(arm, ["how are you"])[0]
        assert second.new_positions < second.positions
        assert (first.new_positions < first.positions) == (
            arm != "retrieval"
        )  # which has nothing but the system prompt
        # A new object answers alike, from nothing.
        assert build(model, processor).answer(arm, ["how are you"])[0].text == second.text
        assert arms.reading_seconds[arm] > 0


@pytest.mark.parametrize("arm", ARMS)
def test_questions_answered_together_have_the_answers_of_each_alone(model, processor, arm):
    asked = ["what did he say", "how are you", "i am fine thanks how are you", "hello"]
    alone, together = build(model, processor, asked=asked), build(model, processor, asked=asked)
    for arms in (alone, together):  # each prompt is then processed after the same positions
        arms.answer(arm, asked[:1])
    expected, found = [alone.answer(arm, [text])[0] for text in asked], together.answer(arm, asked)
    for one, other in zip(found, expected, strict=True):
        assert (one.text, one.positions, one.shown) == (other.text, other.positions, other.shown)
        assert (one.new_positions, one.held_bytes) == (other.new_positions, other.held_bytes)
    assert len({one.seconds for one in found}) == 1 and len({one.positions for one in found}) > 1


def test_a_text_that_is_too_long_loses_its_oldest_turns(model, processor, prompts):
    whole = build(model, processor, 40).answer("full", ["how are you"])[0].positions
    arms = build(model, processor, 40, max_positions=whole // 2)
    found = arms.answer("full", ["how are you"])[0]
    assert whole // 3 < found.positions <= whole // 2 - 4
    assert "t39" in found.shown and "t0" not in found.shown
    memory = build(model, processor, 300, max_positions=300, top_k=1).answer("memory_retrieval", ["how are you"])[0]
    assert memory.positions <= 296 and "t299" in memory.shown and len(memory.shown) < 300
    assert build(model, processor, max_memories=5).answer("memory", ["how are you"])[0].shown <= {
        f"t{i}" for i in range(7, 12)
    }
    with pytest.raises(ValueError, match="Give a larger max_positions"):
        build(model, processor, max_positions=20)


def test_both_arms_retrieve_the_same_turns_and_find_a_speaker_by_the_name(model, processor):
    said = [Said(f"t{i}", "user", name, "fine thanks", "1 May") for i, name in enumerate(("anna", "bo", "zoe"))]
    asked = [f"{turn.name} fine thanks" for turn in said]
    arms = Arms(model.eval(), processor, said, asked, Settings(top_k=1, max_new_tokens=2), letters)
    for turn, question in zip(said, asked, strict=True):
        assert arms.answer("retrieval", [question])[0].shown == {turn.id}
        assert arms.answer("memory_retrieval", [question])[0].shown == {"t0", "t1", "t2"}
        session = arms._recalling_session()[0].fork()
        session.reply(BEFORE + question + AFTER, max_new_tokens=2)
        assert [said[place].id for place in session.last_turn.recalled] == [turn.id]


def test_retrieval_by_the_memorys_own_vectors(model, processor):
    arms = build(model, processor, embed=None)
    session = arms._recalling_session()[0].fork()
    session.reply(as_turn("what did he say"), max_new_tokens=2)
    recalled = {arms.said[place].id for place in session.last_turn.recalled}
    assert arms.answer("retrieval", ["what did he say"])[0].shown == recalled
    assert len(arms.answer("retrieval", ["what did he say"])[0].shown) == 2
    assert (
        arms.answer("memory_retrieval", ["what did he say"])[0].positions
        > arms.answer("memory", ["how are you"])[0].positions
    )


def test_questions_are_asked_as_their_benchmark_says():
    def of(category, **more):
        return Question("q1", "Who?", "dogs", category, **more)

    assert ask("locomo", of("single-hop")) == ("Who?", {})
    assert "date" in ask("locomo", of("temporal"))[0]
    text, options = ask("locomo", of("adversarial"))
    assert set(options) == {"a", "b"} and set(options.values()) == {"dogs", "Not mentioned in the conversation"}
    assert f"(a) {options['a']} (b) {options['b']}" in text and ask("locomo", of("adversarial"))[0] == text
    for written in ("a", "(a)", "A", "(a) I think"):
        assert read_choice(written, options) == options["a"]
    assert read_choice("a dog", options) == "a dog" and read_choice("b", {}) == "b"
    assert without_name("Bo: a dog", {"Clara", "Bo", None}) == "a dog" and without_name("Bob: x", {"Bo"}) == "Bob: x"
    assert ask("longmemeval", of("x", date="today"))[0] == "[today] Who?"


def test_the_command_writes_all_and_continues(base_folder, tmp_path, monkeypatch, capsys):
    conversation = {"speaker_a": "Clara", "speaker_b": "Bo", "session_1_date_time": "8 May"}
    conversation["session_1"] = [
        {"speaker": turn.name, "dia_id": f"D1:{i}", "text": turn.text} for i, turn in enumerate(talk(8))
    ]
    qa = [
        {"question": f"what did {name} say", "answer": "old dog", "evidence": ["D1:7"], "category": category}
        for name, category in (("clara", 1), ("he", 4), ("you", 4))
    ]
    data = tmp_path / "locomo.json"
    data.write_text(json.dumps([{"sample_id": "c", "conversation": conversation, "qa": qa}]), encoding="utf-8")
    out = tmp_path / "out"
    command = ["evaluate", "memory", base_folder, str(data), "--output", str(out), "--retriever", "memory"]
    command += ["--last", "2", "--top_k", "2", "--max_new_tokens", "3", "--device", "cpu"]
    answered, real = [], Arms.answer
    monkeypatch.setattr(Arms, "answer", lambda self, arm, asked: answered.extend(asked) or real(self, arm, asked))
    assert cli([*command, "--arms", "last", "memory"]) == 0
    results = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == ["last", "memory"] and len(answered) == 6
    assert results["arms"]["last"]["questions"] == {"all": 3, "multi-hop": 1, "single-hop": 2}
    assert results["arms"]["memory"]["evidence_recall"]["all"] == 1.0
    assert (out / "memory.md").read_text(encoding="utf-8") in capsys.readouterr().out
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"question_id", "hypothesis"} <= json.loads(lines[0]).keys()
    # A stopped run has written a few answers, the last one in half.
    (out / "answers.jsonl").write_text("\n".join([*lines[:4], lines[4][:20]]), encoding="utf-8")
    answered.clear()
    assert cli([*command, "--arms", "last", "memory"]) == 0
    again = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    assert len(answered) == 2
    assert again["arms"]["last"] == results["arms"]["last"]
    assert again["arms"]["memory"]["f1"] == results["arms"]["memory"]["f1"]
    # So has one that answers several questions together, which are counted one by one.
    (out / "answers.jsonl").write_text("\n".join(lines[:1]) + "\n", encoding="utf-8")
    answered.clear()
    assert cli([*command, "--arms", "last", "memory", "--batch_size", "2"]) == 0
    assert len(answered) == 5
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["batch"] for line in lines] == [1, 2, 2, 2, 2, 1]
    together = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    assert together["arms"]["last"]["f1"] == results["arms"]["last"]["f1"]
    # Other settings give other answers.
    answered.clear()
    assert (
        cli([*command[:-4], "--max_new_tokens", "2", "--device", "cpu", "--arms", "last", "--max_questions", "2"]) == 0
    )
    assert len(answered) == 2
    assert json.loads((out / "memory.json").read_text(encoding="utf-8"))["arms"]["last"]["questions"]["all"] == 2

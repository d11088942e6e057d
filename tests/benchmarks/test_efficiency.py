"""Tests of the efficiency benchmark: equal results of the arms, counts that match the processor, output files."""

import json

import pytest
import torch

from empathic.benchmarks import efficiency, efficiency_report
from empathic.benchmarks.efficiency_arms import (
    ARMS,
    CostMeter,
    count_positions,
    make_conversation,
    measure_arms,
    prepare_arms,
    preset_parts,
    shared,
)
from empathic.benchmarks.efficiency_turns import language_model_alone, measure_turns, session_at
from empathic.benchmarks.memory_plan import weight_bytes
from empathic.benchmarks.scan import compare, encoder_sides, peaks, scan_sides
from empathic.cli import build_parser
from empathic.cli import main as cli


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return preset_parts("tiny", torch.float32, "cpu")


def test_several_vectors_an_utterance_are_counted(tmp_path):
    torch.manual_seed(0)
    model, processor = preset_parts("tiny", torch.float32, "cpu", memory_tokens=2, memory_rate=5)
    messages = make_conversation(processor, 6, 12)
    counts = [processor.count_memories(m["role"], m["content"]) for m in messages[:-1]]
    assert min(counts) >= 2 and max(counts) >= 3
    one = count_positions(preset_parts("tiny", torch.float32, "meta")[1], messages)["memory"]
    found = count_positions(processor, messages)["memory"]
    assert all(found[key] - one[key] == sum(counts) - 6 for key in found)
    arms = prepare_arms(model, processor, messages)
    with torch.inference_mode():
        assert torch.allclose(arms["compressed"].run(1), arms["streaming"].run(1), atol=1e-4)
    assert arms["streaming"].new_positions < arms["compressed"].new_positions
    assert efficiency.position_rows(processor, tokens=25, seed=0)[0]["wanted"] is None
    options = ["--plan", "--memory_rate", "5", "--utterance", "12", "--turns", "2", "--output", str(tmp_path)]
    memory = efficiency.main(options)["memory"]
    assert memory["memory_rate"] == 5 and memory["vectors"] > 2 and 3 < memory["tokens"] < 6
    assert "memory vectors, one for" in (tmp_path / "efficiency.md").read_text()
    with pytest.raises(SystemExit, match="a checkpoint has its own"):
        efficiency.settle(efficiency.parse(["--model", "x", "--memory_rate", "5"]))


@pytest.mark.parametrize("turns", [1, 2, 5, 8])
def test_arms_give_the_same_scores_for_the_same_conversation(model, processor, turns):
    messages = make_conversation(processor, turns, 9)
    arms = prepare_arms(model.eval(), processor, messages)
    with torch.inference_mode():
        scores = {name: arm.run(1) for name, arm in arms.items()}
        again = {name: arm.run(1) for name, arm in arms.items()}
    for one, other in (("text", "text_reuse"), ("compressed", "streaming")):
        assert arms[one].prompt == arms[other].prompt
        assert torch.allclose(scores[one], scores[other], atol=1e-4)
    assert (scores["text"] - scores["compressed"]).abs().max() > 1e-2  # otherwise the equalities above would be trivial
    assert all(torch.equal(scores[name], again[name]) for name in ARMS), "a run changed what was kept"
    for history, arm in (("text", "text"), ("memory", "compressed")):
        inputs = processor.apply_chat_template(
            messages, history=history, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert arms[arm].prompt == inputs["input_ids"][0].tolist()
        with torch.inference_mode():
            assert torch.allclose(model(**inputs).logits[:, -1:], scores[arm], atol=1e-4)


def test_counts_are_those_of_the_processor_and_the_session(model, processor):
    messages = make_conversation(processor, 6, 9)
    assert [m["role"] for m in messages] == ["user", "assistant"] * 3 + ["user"]
    assert all(1 <= len(processor.encode_plain(m["content"])) <= 9 for m in messages)
    assert make_conversation(processor, 4, 9) == messages[2:], "a longer history ends with the shorter one"
    counts, arms = count_positions(processor, messages), prepare_arms(model.eval(), processor, messages)
    clip = {"type": "video", "video": torch.zeros(2, 32, 32, 3, dtype=torch.uint8).numpy()}
    sound = {"type": "audio", "audio": torch.zeros(16000).numpy(), "sampling_rate": 16000}
    for history in ("text", "memory"):
        whole = len(processor.prepare(messages, history=history)["input_ids"])
        content = [sound, clip, {"type": "text", "text": messages[-1]["content"]}]
        media = [*messages[:-1], {"role": "user", "content": content}]
        assert counts[history] == {
            "whole": whole,
            "with_media": len(processor.prepare(media, history=history)["input_ids"]),
            "history": whole - len(processor.prepare(messages[-1:], history=history)["input_ids"]),
        }
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.memory_token)
    assert arms["streaming"].prompt.count(placeholder) == 6
    assert counts["memory"]["history"] < counts["text"]["history"]

    session = session_at(model, processor, messages, reply=2)
    assert [m["content"] for m in session.messages[:5]] == [m["content"] for m in messages[:5]]
    session.reply(messages[-1]["content"], max_new_tokens=1)
    assert session.last_turn.new_positions == arms["streaming"].new_positions
    assert session.last_turn.memory_vectors == 6


def test_what_streaming_processes_does_not_grow(tiny):
    model, processor = tiny
    found = {turns: measure_arms(model, processor, make_conversation(processor, turns, 12), 1) for turns in (8, 24)}
    few, many = found[8], found[24]
    for key in ("new_positions", "memory_tokens"):
        assert many["streaming"][key] == few["streaming"][key]
    assert many["text"]["new_positions"] > 2 * few["text"]["new_positions"]
    assert many["compressed"]["new_positions"] - few["compressed"]["new_positions"] == 16
    assert many["compressed"]["memory_tokens"] > 2.5 * few["compressed"]["memory_tokens"]
    assert many["text_reuse"]["new_positions"] < many["text"]["new_positions"] / 3
    # Memory: per utterance, streaming keeps the keys and values of a vector, text those of all tokens.
    assert many["streaming"]["peak_bytes"] < many["text_reuse"]["peak_bytes"] < many["text"]["peak_bytes"]
    per_position = 2 * 3 * 128 * 4  # keys and values, layers, width, bytes
    assert many["streaming"]["kept_bytes"] - few["streaming"]["kept_bytes"] == 16 * per_position


def test_all_logits_take_their_memory(tiny):
    model, processor = tiny
    arm = prepare_arms(model, processor, make_conversation(processor, 8, 12))["text"]
    meter = CostMeter(model)
    with torch.inference_mode():
        assert arm.run(1).shape[1] == 1 and arm.run(0).shape[1] == arm.new_positions
        few, many = (meter.peak(lambda keep=keep: arm.run(keep), arm.held) for keep in (1, 0))
    vocabulary = model.config.text_config.vocab_size
    assert few < many <= few + 4 * vocabulary * arm.new_positions
    assert many >= 4 * vocabulary * arm.new_positions


def test_slow_runs_are_not_repeated(tiny, monkeypatch):
    meter, calls = CostMeter(tiny[0]), []
    seconds = {"slow": 60.0, "fast": 0.5}

    def measured(run):
        run()
        return seconds[calls[-1]]

    monkeypatch.setattr(meter, "seconds", measured)
    runs = {name: lambda name=name: calls.append(name) for name in seconds}
    assert meter.alternate(runs, 3) == seconds
    assert calls == ["slow", "fast", "fast", "fast", "fast"]


def test_common_beginnings():
    assert shared([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared([1, 2, 3, 4], [1, 2, 3]) == 2, "the last position has to be processed"
    assert shared([1, 2], [1, 2, 3, 4]) == 2 and shared([], [1]) == 0


def test_whole_turns(model, processor):
    conversations = {turns: make_conversation(processor, turns, 6) for turns in (4, 8)}
    found = measure_turns(model.eval(), processor, conversations, reply=2, repeats=1)
    assert found[4]["new_positions"] == found[8]["new_positions"]
    assert all(found[4][key] >= 0 for key in ("streaming", "anew", "encoding", "reading", "model"))


def test_the_language_model_alone_runs_over_the_positions_of_a_turn(model):
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    with torch.inference_mode():
        run = language_model_alone(model.eval(), positions=5, reused=7, reply=3)
        run()
        run()
    assert seen == [7, 5, 1, 1, 5, 1, 1]


def test_the_scan_equals_the_default_and_takes_less_memory():
    for sides in (scan_sides(64, 24, 2), encoder_sides(64, 24, 2)):
        found = compare(sides, repeats=1)
        assert found["largest_difference"] < 1e-4
        assert found["memory"] == found["ours"]["peak_bytes"] / found["transformers"]["peak_bytes"]
    long = {name: size for name, (size, _) in peaks(encoder_sides(32, 512, 1)).items()}
    assert long["ours"] <= 0.35 * long["transformers"]


def test_rows_say_whether_they_hold():
    assert efficiency.row("a", 8.0, ">=", 5.0)["holds"] and not efficiency.row("a", 4.0, ">=", 5.0)["holds"]
    assert efficiency.row("a", 0.1, "<=", 0.2)["holds"] and not efficiency.row("a", 0.3, "<=", 0.2)["holds"]
    printed = efficiency_report.ratio_table([efficiency.row("a", 4.0, ">=", 5.0), efficiency.row("b", 1.0)])
    assert "| a | 4 | >= 5 | **no** |" in printed and "| b | 1 |  |  |" in printed


def test_positions_hold_at_the_papers_length(tiny):
    lengths = {len(tiny[1].encode_plain(m["content"])) for m in make_conversation(tiny[1], 20, 25)}
    assert lengths <= {24, 25}
    rows = efficiency.position_rows(tiny[1], tokens=25, seed=0)
    assert [row["holds"] for row in rows] == [True, True, None]
    assert "at 20 utterances" in rows[0]["what"] and rows[0]["measured"] < rows[2]["measured"]


def test_the_command_writes_all(base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(efficiency, "TURN_PAIR", (2, 4))
    monkeypatch.setattr(efficiency, "SCAN_LENGTHS", (16, 32))
    out = tmp_path / "out"
    options = ["--model", base_folder, "--turns", "4", "2", "--utterance", "6", "--repeats", "1", "--reply", "2"]
    assert cli(["evaluate", "efficiency", *options, "--device", "cpu", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "efficiency.json").read_text())
    assert list(results["histories"]) == ["2", "4"] and list(results["turns"]) == ["2", "4"]
    for entry in results["histories"].values():
        positions, arms = entry["positions"], entry["arms"]
        assert list(arms) == list(ARMS)
        assert {arms[arm]["positions"] for arm in ("text", "text_reuse")} == {positions["text"]["whole"]}
        assert {arms[arm]["positions"] for arm in ("compressed", "streaming")} == {positions["memory"]["whole"]}
    assert len([row for row in results["ratios"] if row["wanted"] is not None]) == 7
    report = (out / "efficiency.md").read_text()
    assert report in printed
    assert all(title in report for title in efficiency_report.TITLES.values())
    for name in ("positions", "seconds", "memory", "memory_all_logits"):
        assert f"]({name}.png)" in report and (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_papers_setting_stands_beside_its_figures(tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = ["--paper", "--dialogues", "2", "--repeats", "1", "--device", "cpu", "--output", str(out)]
    results = efficiency.main(options)
    means = results["paper"]["means"]
    assert 550 < means["text"]["positions"] < 660, "the paper's prompts took 606"
    assert means["compressed"]["positions"] / means["text"]["positions"] < 0.2
    assert means["text"]["total_bytes"] == results["paper"]["weight_bytes"] + means["text"]["peak_bytes"]
    report = (out / "efficiency.md").read_text()
    assert "| full text, published | 606.23 | 16.3 |  |  | 0.1112 |" in report.replace("111.2", "0.1112")
    assert "111.52 (-81.6%)" in report and "(-3.5%)" in report and "(-28.5%)" in report


def test_the_papers_setting_takes_a_data_set(recordings, tmp_path, model, processor, monkeypatch):
    monkeypatch.setattr(efficiency, "PAPER_TURNS", range(2, 4))
    options = ["--paper", "--data", recordings.data, "--split", "validation", "--dialogues", "2", "--device", "cpu"]
    parsed = efficiency.settle(efficiency.parse([*options, "--repeats", "1"]))
    found, about = efficiency.paper_conversations(parsed, processor)
    assert [[m["content"] for m in messages] for messages in found] == [
        ["hello there", "how are you", "i am fine thanks"]
    ] * 2
    assert found[0][-1]["role"] == "user" and "validation" in about
    monkeypatch.setattr(efficiency, "PAPER_TURNS", range(20, 24))
    with pytest.raises(SystemExit, match="no turn has 20 utterances before it"):
        efficiency.paper_conversations(parsed, processor)


def test_without_a_gpu_the_full_size_is_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = efficiency.main(["--preset", "qwen2.5-7b", "--turns", "20", "--output", str(tmp_path / "out")])
    assert results["histories"]["20"]["arms"] is None and "Nothing was measured" in capsys.readouterr().out
    assert all(row["holds"] is not False for row in results["ratios"])
    assert "turns" not in results and "scan" not in results
    paper = efficiency.main(["--preset", "qwen2.5-7b", "--paper", "--output", str(tmp_path / "paper")])
    assert list(paper["histories"]) == ["20", "21", "22", "23"] and "paper" not in paper
    with pytest.raises(SystemExit, match="there is no GPU"):
        efficiency.main(["--device", "cuda"])


@pytest.mark.parametrize("table", [[], ["efficiency"], ["reconstruction"]])
def test_evaluate_shows_an_example(table, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["evaluate", *table, "--help"])
    assert stop.value.code == 0
    example = capsys.readouterr().out.split("example:\n  empathic ")[1].split()
    known = build_parser().parse_args(example)
    assert known.command == "evaluate" and callable(known.run) and (not table or known.table == table[0])


def test_the_command_in_the_report_gives_the_same_options():
    for given in (
        ["--turns", "3", "--reply", "4", "--no-ratios"],
        ["--paper", "--dialogues", "2", "--seed", "7"],
        ["--memory_tokens", "2", "--memory_rate", "16"],
    ):
        options = efficiency.settle(efficiency.parse([*given, "--device", "cpu"]))
        assert efficiency.settle(efficiency.parse(efficiency.as_arguments(options))) == options


def test_weights_are_counted_once(tiny):
    model = tiny[0]
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()]}
    assert CostMeter(model).weight_bytes == weight_bytes(model) == sum(unique.values())

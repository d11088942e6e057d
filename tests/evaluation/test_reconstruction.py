"""Rebuilding held-out utterances (Table 8): runs, scores beside hand-made ones, and the command."""

import json

import pytest
import torch
from datasets import load_dataset

from empathic.cli import main as cli
from empathic.evaluation import reconstruction as r
from empathic.evaluation.generation import generate_texts
from empathic.evaluation.memory_likelihood import _others, likelihood
from empathic.trainers.samples import rebuild_sample


@pytest.fixture
def rows(recordings):
    return load_dataset(recordings.data, split="validation")


def turn(speaker, text):
    return {"speaker": speaker, "text": text, "turn": 0, "dialogue_id": "d"}


def test_runs_do_not_overlap_and_stay_in_their_conversation(rows):
    texts = ["hello there", "how are you", "i am fine thanks", "what did he say"]
    for length, count in ((1, 12), (2, 6), (3, 3), (4, 3), (5, 0)):
        runs = r.runs_of(rows, length)
        assert len(runs) == count and {len(run) for run in runs} <= {length}
        assert all(len({row["dialogue_id"] for row in run}) == 1 for run in runs)
    assert [[row["text"] for row in run] for run in r.runs_of(rows, 2)[:2]] == [texts[:2], texts[2:]]
    silent = [
        {**row, "text": "" if row["turn"] == 1 else row["text"]} for row in rows.remove_columns(["audio", "video"])
    ]
    assert [[row["turn"] for row in run] for run in r.runs_of(silent, 2)] == [[2, 3]] * 3


def test_what_is_rebuilt_is_what_the_model_writes(model, processor, rows):
    runs = r.runs_of(rows, 2)[:3]
    answers, expected = r.rebuild(model, processor, runs, batch_size=2)
    assert expected[0] == "clara: hello there\nbot: how are you"
    samples = [rebuild_sample(run)["messages"] for run in runs]
    longest = max(len(processor.encode_reply(text)) for text in expected) + 8
    assert answers == generate_texts(model, processor, samples, "memory", max_new_tokens=longest, batch_size=1)
    row = r.reconstruction_row(model, processor, runs, {"hello"}, batch_size=2)
    assert row == r.scores(answers, expected, {"hello"}) and list(row) == ["bleu1", "bleu4", "recall", "exact"]


def test_scores_of_known_answers():
    expected = ["ann: i have a dog\nben: no", "ann: yes"]
    perfect = r.scores(expected, expected, {"dog"})
    assert perfect == {"bleu1": 1.0, "bleu4": perfect["bleu4"], "recall": 1.0, "exact": 1.0}
    found = r.scores(["ann: i have a cat\nben: no", "ann: yes"], expected, {"dog", "ann"})
    assert found["exact"] == 0.5 and found["recall"] == pytest.approx(2 / 3)
    assert found["bleu1"] == pytest.approx(11 / 12)  # the colons are tokens, as are the names


def test_utterances_count_in_their_own_place():
    runs = [[turn("a", "hi"), turn("b", "yes"), turn("a", "ok  then")]]
    assert r.exact_utterances(["a: hi\nb: no\na: ok then"], runs) == pytest.approx(2 / 3)
    assert r.exact_utterances(["b: yes\na: hi\na: ok"], runs) == 0
    assert r.exact_utterances([""], runs) == 0


def test_content_words():
    words = r.content_words_of(["I don't have a dog, Clara", "don’t you like Oslo", "Clara’s dog"])
    assert words == {"dog", "clara", "like", "oslo", "clara’s"}


def test_options_are_checked():
    with pytest.raises(ValueError, match="from 1 up"):
        r.ReconstructionOptions(utterances=[0, 5])
    with pytest.raises(ValueError, match="max_runs is 0"):
        r.ReconstructionOptions(max_runs=0)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with a RoBERTa of random weights."""
    from transformers import RobertaConfig, RobertaModel

    from empathic.tiny.emotion_classifier import build_tokenizer

    folder = str(tmp_path_factory.mktemp("roberta"))
    tokenizer = build_tokenizer(["hello there you all", "how are you", "fine thanks"])
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=42, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_command_writes_table_texts_and_examples(base_folder, recordings, roberta, tmp_path, capsys):
    pytest.importorskip("bert_score")
    out = tmp_path / "out"
    command = ["evaluate", "reconstruction", base_folder, recordings.data, "--split", "validation", "--device", "cpu"]
    command += ["--utterances", "2", "1", "9", "--max_runs", "5", "--batch_size", "4", "--examples", "2"]
    options = ["--bertscore_model", roberta, "--bertscore_layer", "2", "--output", str(out)]
    assert cli([*command, *options]) == 0
    results = json.loads((out / "reconstruction.json").read_text())
    assert results["runs"] == {"1": 5, "2": 5} and results["without"] == [9]
    for row in results["scores"].values():
        assert set(row) == set(r.SCORE_COLUMNS) - {"names"} and all(0 <= value <= 1 for value in row.values())
    written = [json.loads(line) for line in (out / "reconstruction.jsonl").read_text().splitlines()]
    assert [entry["utterances"] for entry in written] == [1] * 5 + [2] * 5
    pairs = [(entry["rebuilt"], entry["original"]) for entry in written[5:]]
    assert results["scores"]["2"]["bleu1"] == r.bleu(*map(list, zip(*pairs, strict=True)), 1)
    report = (out / "reconstruction.md").read_text()
    assert "| published (MultiDialog, test_freq) | | 0.848 | 0.679 | 0.969 |" in report
    assert report.count("| original | rebuilt |") == 4 and "long enough for: 9" in report
    assert "layer 2, F1" in report and "5 runs" in capsys.readouterr().out
    assert "nats per token" in report and all(row["own"] > 0 for row in results["likelihood"].values())
    assert results["rates"][0]["utterances"] == 5 and results["rates"][0]["vectors"] == 1.0
    assert "vectors per token" in report and (out / "reconstruction.png").is_file()
    # The same seed gives the same table.
    assert cli([*command, *options[:4], "--output", str(tmp_path / "again"), "--compare", str(out)]) == 0
    assert json.loads((tmp_path / "again" / "reconstruction.json").read_text())["scores"] == results["scores"]


def test_the_likelihood_under_own_and_other_vectors(model, processor):
    texts = ["hello there", "how are you", "i am fine thanks"]
    runs = [[{"speaker": "clara", "text": text, "corpus": "c", "dialogue_id": text, "turn": 0}] for text in texts]
    found = likelihood(model.eval(), processor, runs, batch_size=8)
    totals, tokens = {"own": 0.0, "other": 0.0}, 0
    for place, text in enumerate(texts):
        target = processor.encode_reply(f"clara: {text}")
        for name, said in (("own", text), ("other", texts[(place + 1) % 3])):
            inputs = processor.pad([processor.prepare([{"role": "user", "name": "clara", "content": said}], "memory")])
            ids = torch.cat([inputs.pop("input_ids"), torch.tensor([target])], dim=1)
            del inputs["attention_mask"]
            with torch.no_grad():
                scores = model(input_ids=ids, **inputs).logits[0, -len(target) - 1 : -1].log_softmax(-1)
            totals[name] -= scores[range(len(target)), target].sum().item()
        tokens += len(target)
    assert found == pytest.approx({name: total / tokens for name, total in totals.items()}, rel=1e-4)
    assert likelihood(model, processor, runs[:1]) is None
    assert _others([1, 2, 1, 1, 2, 3]) == [2, 4, 3, 0, 1, 5]


def test_bertscore_is_left_out_where_its_model_is_not(base_folder, recordings, tmp_path, capsys):
    command = ["evaluate", "reconstruction", base_folder, recordings.data, "--split", "validation", "--device", "cpu"]
    command += ["--utterances", "2", "--max_runs", "1", "--output", str(tmp_path / "out")]
    assert cli([*command, "--bertscore_model", str(tmp_path / "nowhere"), "--bertscore_layer", "2"]) == 0
    printed = capsys.readouterr().out
    assert "BERTScore: skipped: " in printed and "nowhere" in printed
    results = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert "bertscore" not in results["scores"]["2"]
    assert "BERTScore |" not in (tmp_path / "out" / "reconstruction.md").read_text()
    assert cli([*command, "--bertscore_model", "none"]) == 0
    assert "not requested" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_an_error(base_folder, recordings, tmp_path, capsys):
    command = ["evaluate", "reconstruction", base_folder, recordings.data, "--device", "cpu", "--output", str(tmp_path)]
    assert cli([*command, "--split", "nosuch"]) == 1
    assert "nosuch" in capsys.readouterr().err
    assert cli([*command, "--split", "validation", "--utterances", "9", "--bertscore_model", "none"]) == 1
    assert "No conversation has 9 utterances" in capsys.readouterr().err
    assert cli([*command, "--compare", str(tmp_path / "nothing")]) == 1
    assert "has no rates to compare with" in capsys.readouterr().err


def test_texts_of_models_are_text_in_the_report():
    results = {"scores": {"1": {"bleu1": 0.5}}, "runs": {"1": 1}, "bertscore": "none", "without": []}
    results |= {"model": "m", "data": "d", "split": "s"}
    entry = {"utterances": 1, "id": "x", "original": "a: hi", "rebuilt": "a: <b>x</b> | [y](z)\nmore"}
    report = r.markdown(results, [entry], 1)
    assert "<b>" not in report and "&lt;b&gt;" in report and "[y]" not in report
    assert "| a: hi | a: &lt;b&gt;x&lt;/b&gt; &#124; &#91;y&#93;(z) |" in report and "|  | more |" in report

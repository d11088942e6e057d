"""`empathic evaluate dialogue` and `ablation` on tiny models: scores beside independent ones, rows, processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate import PartialState

from empathic.cli import main
from empathic.commands import evaluate as evaluate_command
from empathic.evaluation import dialogue
from empathic.evaluation.dialogue import ABLATION, SEEN, ablation_specs, show
from empathic.evaluation.emotion_features import EmotionFeatures
from empathic.evaluation.metrics import bleu, corpus_dist_1, dist_1
from empathic.evaluation.published import TABLE_1, TABLE_2
from empathic.evaluation.replies import read_replies
from empathic.evaluation.reply_emotion import emotion_of_labels
from empathic.evaluation.scores import Scoring, score_replies
from empathic.evaluation.statistics_of_replies import ADJUSTED, add_adjusted, holm
from empathic.tiny.emotion_classifier import train_emotion_classifier


@pytest.fixture(scope="module", autouse=True)
def forget_the_device():
    """`--device cpu` stays set in accelerate's state; other tests of this process are to choose for themselves."""
    yield
    PartialState._reset_state()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    train_emotion_classifier(folder, ["a b", "c d"], ["happy", "sad"], steps=1, progress=False)
    return str(folder)


@pytest.fixture(scope="module")
def options(recordings, classifier):
    line = ["--data", recordings.data, "--split=validation", "--device=cpu", f"--classifier={classifier}"]
    line += ["--max_new_tokens=8", "--batch_size=4", "--resamples=200"]
    return line


BERT = ["--bertscore_layer=1"]


@pytest.fixture(scope="module")
def evaluated(base_folder, options, classifier, tmp_path_factory):
    """OUT of two systems, with every metric."""
    out = tmp_path_factory.mktemp("evaluated")
    systems = [f"ours=empathic:{base_folder}", f"plain=empathic:{base_folder},media=false,history=none"]
    metrics = ["bertscore", "emotion_score", "dist1", "corpus_dist1", "bleu1", "bleu4"]
    line = [*systems, *options, f"--bertscore_model={classifier}", *BERT, "--metrics", *metrics, f"--output={out}"]
    assert main(["evaluate", "dialogue", *line]) == 0
    return out, line


def test_the_table_is_what_the_metrics_give_of_the_saved_replies(evaluated, classifier):
    out, _ = evaluated
    results = json.loads((out / "dialogue.json").read_text())
    assert list(results["systems"]) == ["ours", "plain"] and results["skipped"] == {} and results["left_out"] == []
    for name, system in results["systems"].items():
        rows = read_replies(out / system["replies"])
        said, true = [row["reply"] for row in rows], [row["reference"] for row in rows]
        assert system["count"] == len(rows) == 9 and any(said)
        expected = {
            "dist1": dist_1(said, allow_empty=True),
            "corpus_dist1": corpus_dist_1(said, allow_empty=True),
            "bleu1": bleu(said, true, 1),
            "bleu4": bleu(said, true, 4),
            "emotion_score": np.mean(
                [
                    EmotionFeatures(classifier).similarity([a], [b])[0] if a else 0
                    for a, b in zip(said, true, strict=True)
                ]
            ),
        }
        for metric, value in expected.items():
            found = system["metrics"][metric]
            assert found["mean"] == pytest.approx(value, abs=1e-5), (name, metric)
            if metric != "corpus_dist1":
                assert found["low"] <= found["high"] and found["low"] - 1e-9 <= found["mean"] <= found["high"] + 1e-9
        assert system["metrics"]["corpus_dist1"]["low"] is None
        assert 0 < system["metrics"]["bertscore"]["mean"] <= 1
        assert system["settings"]["media"] is (name == "ours")
    metrics = [found["metric"] for found in results["comparisons"]]
    assert metrics == ["bertscore", "emotion_score", "dist1", "bleu1", "bleu4"]
    for found in results["comparisons"]:
        means = {name: system["metrics"][found["metric"]]["mean"] for name, system in results["systems"].items()}
        assert (found["a"], found["b"]) == ("plain", "ours")
        assert found["difference"] == pytest.approx(means["plain"] - means["ours"]) and 0 < found["p"] <= 1
    assert f"{classifier}, pooling mean" in results["computed_by"]["emotion_score"]
    assert results["versions"]["torch"] and results["settings"]["corpora"] and results["settings"]["seed"] == 0


def test_another_run_says_the_same_and_makes_no_reply(evaluated, capsys, monkeypatch):
    out, line = evaluated
    before = (out / "dialogue.json").read_bytes()
    monkeypatch.setattr("empathic.evaluation.systems.ours.load_model", None)
    assert main(["evaluate", "dialogue", *line]) == 0
    assert (out / "dialogue.json").read_bytes() == before
    shown = capsys.readouterr().out
    assert "ours " in shown and "BERTScore" in shown and "The paper has no row for" in shown


def test_what_cannot_be_loaded_is_said(base_folder, options, tmp_path, capsys):
    missing = ["--bertscore_model=nobody/nothing", "--bertscore_layer=1", "--max_samples=2"]
    assert main(["evaluate", "dialogue", f"a=empathic:{base_folder}", *options, *missing, f"--output={tmp_path}"]) == 0
    results = json.loads((tmp_path / "dialogue.json").read_text())
    assert "nobody/nothing" in results["skipped"]["bertscore"] and "bertscore" not in results["computed_by"]
    assert "BERTScore is left out" in capsys.readouterr().out
    # Both samples are of one conversation: there is a value, and nothing to tell how sure it is.
    assert results["systems"]["a"]["metrics"]["dist1"]["low"] is None and results["comparisons"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["a=empathic:x", "a=empathic:y"], "Two systems have the name a"),
        (["a=empathic:x", "--baseline=b"], "baseline 'b' is not one of"),
        (["a=empathic:x", "--reply_speakers", "nobody"], "None of ['nobody'] replies"),
        (["a=empathic:x", "--confidence=2"], "confidence is 2"),
        (["a=empathic:x", "--pooling=max"], "pooling 'max' is not one of"),
        (["a=empathic:nobody/nothing"], "nobody/nothing is not a folder"),
    ],
)
def test_what_does_not_fit_is_an_error_before_any_reply(line, message, options, tmp_path, capsys):
    assert main(["evaluate", "dialogue", *line, *options, f"--output={tmp_path}"]) == 1
    assert message in capsys.readouterr().err


def test_every_data_set_has_its_own_table(base_folder, options, recordings, tmp_path):
    other = tmp_path / "other"
    os.symlink(recordings.data, other)
    line = [*options, "--data", recordings.data, str(other), "--metrics", "dist1", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", "dialogue", f"a=empathic:{base_folder}", *line]) == 0
    name = recordings.data.rsplit("/", 1)[1]
    tables = [json.loads((tmp_path / "out" / n / "dialogue.json").read_text()) for n in (name, "other")]
    assert tables[0]["systems"]["a"]["metrics"] == tables[1]["systems"]["a"]["metrics"]


# ------------------------------------------------------------------------------------------------------------- scores


def rows(replies, references=None, corpus="iemocap"):
    references = references or ["yes it is"] * len(replies)
    return [
        {"id": f"{corpus}/test/d{i // 2}/{i % 2}", "reply": reply, "reference": reference}
        for i, (reply, reference) in enumerate(zip(replies, references, strict=True))
    ]


P_VALUES = (0.01, 0.04, 0.03, 0.005)


def rows_of(*replies):
    return rows(replies * 4)


def test_empty_replies_score_nothing_and_blank_references_are_left_out():
    scoring = Scoring(metrics=["dist1", "corpus_dist1", "bleu1"], resamples=50)
    found = score_replies(
        {
            "a": rows(["yes it is", "", "no no", "b"], ["yes it is", "x", "no", " "]),
            "b": rows([""] * 4, ["y", "x", "n", " "]),
        },
        scoring,
        [("a", "b")],
    )
    assert found["left_out"] == [{"id": "iemocap/test/d1/1", "reason": "the true reply is blank"}]
    assert found["systems"]["a"]["count"] == 3 and found["systems"]["a"]["empty"] == 1
    assert found["systems"]["a"]["metrics"]["dist1"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["systems"]["a"]["metrics"]["corpus_dist1"]["mean"] == pytest.approx(4 / 5)
    assert {m: v["mean"] for m, v in found["systems"]["b"]["metrics"].items()} == dict.fromkeys(scoring.metrics, 0.0)
    with pytest.raises(ValueError, match="did not answer the same samples"):
        score_replies({"a": rows(["x", "y"]), "b": rows(["x", "y"], corpus="meld")}, scoring, [])


def test_what_differs_only_before_the_adjustment_has_no_star():
    """The worked example of `holm`: 0.01, 0.04, 0.03 and 0.005 become 0.03, 0.06, 0.06 and 0.02."""
    one = {"metrics": {"dist1": {"mean": 0.5, "low": 0.4, "high": 0.6}}, "count": 9, "empty": 0, "notes": []}
    comparisons = [{"a": name, "b": "z", "metric": "dist1", "p": p} for name, p in zip("abcd", P_VALUES, strict=True)]
    add_adjusted(comparisons)
    settings = {"data": "d", "split": "test", "corpora": {"meld": 2}, "confidence": 0.95, "interval": "i"}
    results = {
        "table": "dialogue", "systems": dict.fromkeys("abcdz", one), "comparisons": comparisons, "baseline": "z",
        "computed_by": {}, "skipped": {}, "left_out": [], "published": {"source": "the paper", "rows": {}},
        "settings": {**settings, "test": f"paired, {ADJUSTED}"},
    }  # fmt: skip
    lines = show(results).splitlines()
    assert [line[0] for line in lines if line.endswith("] *")] == ["a", "d"]
    assert "adjusted for all comparisons of this table (Holm-Bonferroni)." in "\n".join(lines)
    rows = {"a": rows_of("a b"), "b": rows_of("a a"), "c": rows_of("c d")}
    found = score_replies(rows, Scoring(metrics=["dist1", "bleu1"], resamples=50), [("b", "a"), ("c", "a")])
    assert [each["p_holm"] for each in found["comparisons"]] == holm([each["p"] for each in found["comparisons"]])
    assert len(found["comparisons"]) == 4


def test_published_rows_stand_beside_ours():
    found = score_replies({"mine": rows(["a b", "a a"])}, Scoring(metrics=["dist1"], resamples=50), [])
    settings = {"data": "d", "split": "test", "corpora": {"meld": 2}, "confidence": 0.95, "interval": "i", "test": "t"}
    published = {"source": "the paper", "rows": {"meld": TABLE_1["meld"]}}
    text = show({"table": "dialogue", **found, "baseline": "mine", "settings": settings, "published": published})
    (line,) = [line for line in text.splitlines() if line.startswith("GPT-4o")]
    assert line.split() == ["GPT-4o", "(published,", "meld)", "0.980"]
    assert (
        TABLE_1["iemocap"]["Ours†"] == TABLE_2["epo"] and TABLE_1["iemocap"]["Qwen2.5-7B-Instruct†"] == TABLE_2["text"]
    )


# ----------------------------------------------------------------------------------------------------------- ablation


def test_rows_of_the_ablation_are_shown_what_their_recipes_show(base_folder, options, tmp_path, capsys):
    given = [f"{row}={base_folder}" for row in ("epo", "memory_av", "text", "memory")]
    line = [*options, "--metrics", "dist1", f"--output={tmp_path}"]
    assert main(["evaluate", "ablation", *given, *line]) == 0
    results = json.loads((tmp_path / "ablation.json").read_text())
    seen = {name: (s["settings"]["history"], s["settings"]["media"]) for name, s in results["systems"].items()}
    assert list(seen.items()) == [
        ("text", ("text", False)),
        ("memory", ("memory", False)),
        ("memory_av", ("memory", True)),
        ("epo", ("memory", True)),
    ]
    pairs = [(found["a"], found["b"]) for found in results["comparisons"]]
    assert pairs == [
        ("memory", "text"),
        ("memory_av", "text"),
        ("epo", "text"),
        ("memory_av", "memory"),
        ("epo", "memory_av"),
    ]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown if " x " in line] == ["text", "memory", "memory_av", "epo"] * 2
    (line,) = [line for line in shown if line.startswith("base (published, iemocap)")]
    assert line.split()[3:] == ["-", "-", "-", "-", "0.949"]
    replies = {name: (tmp_path / s["replies"]).read_text() for name, s in results["systems"].items()}
    assert replies["memory_av"] == replies["epo"] != replies["memory"] != replies["text"]


def test_what_a_model_was_not_trained_with_is_a_warning(base_folder, options, tmp_path, capsys):
    """Of a stage's record the last run of `dialogue` counts: `epo` keeps what that one was shown."""
    folder = tmp_path / "model"
    shutil.copytree(base_folder, folder)
    seen = {"history": "text", "use_media": False, "lora_r": 4}
    runs = [{"stage": "dialogue", "settings": seen}, {"stage": "epo", "settings": {"history": "memory"}}]
    (folder / "empathic_runs.json").write_text(json.dumps({"runs": runs}))
    line = [f"a=empathic:{folder}", f"b=empathic:{folder},history=text,media=false", *options, "--max_samples=1"]
    assert main(["evaluate", "dialogue", *line, "--metrics", "dist1", f"--output={tmp_path / 'out'}"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if "was trained with" in line]
    assert warnings == [
        "WARNING: a was trained with history text but evaluated with history memory.",
        "WARNING: a was trained with media False but evaluated with media True.",
    ]


@pytest.mark.parametrize("preset", ["tiny", "smollm2-135m", "qwen2.5-0.5b", "qwen2.5-7b"])
def test_the_recipes_train_what_the_rows_are_shown(preset):
    folder = Path(dialogue.__file__).parent.parent / "recipes" / preset
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in folder.glob("dialogue*.yaml")}
    for row, name in (("text", "dialogue_ft"), ("memory", "dialogue_mc"), ("memory_av", "dialogue_mc_av")):
        recipe = recipes[name]
        assert f"history={recipe['history']},media={str(recipe['use_media']).lower()}" == SEEN[row]
        assert recipe["output_dir"].endswith(f"/{name}") and recipe["rebuild_ratio"] == (0 if row == "text" else 0.2)
        assert recipe["dataset_weights"] is None and recipe["dataset_name"] == recipes["dialogue"]["dataset_name"]
    # The last one is the stage of the whole model, on which EPO goes on.
    whole = {**recipes["dialogue_mc_av"], "output_dir": recipes["dialogue"]["output_dir"]}
    stated = {"history": "memory", "use_media": True, "dataset_weights": None}
    assert whole == {**recipes["dialogue"], **stated}


def test_specs_of_the_ablation():
    assert ablation_specs(["epo=a/b", "text=c,history=none"]) == [
        "text=empathic:c,history=text,media=false,history=none",
        "epo=empathic:a/b,history=memory,media=true",
    ]
    assert ablation_specs(["base=empathic:x,media=false"]) == ["base=empathic:x,media=false"]
    assert set(ABLATION) == set(TABLE_2)
    for given, message in (
        (["all=x"], "not a row of the ablation"),
        (["text=x", "text=y"], "given twice"),
        (["base=x"], "needs a kind"),
        (["text"], "Write ROW=PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            ablation_specs(given)


# ---------------------------------------------------------------------------------------------------------- processes


def test_options_are_handed_on_to_the_launched_processes(monkeypatch):
    ran = []
    monkeypatch.setattr(evaluate_command, "launch", lambda *call: ran.append(call) or 3)
    line = ["a=empathic:x", "b=empathic:y", "--data", "d", "e", "--accelerate_config=c.yaml", "--metrics", "dist1"]
    assert main(["evaluate", "dialogue", *line, "--temperature=0.5"]) == 3
    assert main(["evaluate", "emotion", "model", "--data=d", "--accelerate_config=c.yaml"]) == 3
    (module, first, config), (_, second, _) = ran
    assert (module, config) == ("empathic.cli", "c.yaml")
    assert first[:4] == ["evaluate", "dialogue", "a=empathic:x", "b=empathic:y"]
    assert first[first.index("--data") :][:3] == ["--data", "d", "e"] and "--temperature=0.5" in first
    assert second[:3] == ["evaluate", "emotion", "model"] and "--data=d" in second
    assert not any("accelerate_config" in option or "None" in option for option in first + second)


@pytest.mark.distributed
def test_two_processes_give_the_same_table(evaluated, tmp_path):
    """The very same bytes: replies and results."""
    alone, line = evaluated
    config = tmp_path / "two.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\nmain_process_port: 0\n"
    )
    line = [*line[:-1], f"--output={tmp_path / 'out'}", f"--accelerate_config={config}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "empathic.cli", "evaluate", "dialogue", *line],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Results are in") == 1
    parts = {path.name.split("-")[1] for path in (tmp_path / "out").glob("dialogue/*.parts/*.jsonl")}
    assert parts == {"0", "1"}  # both took part
    for name in ("dialogue.json", "dialogue/ours.jsonl", "dialogue/plain.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (alone / name).read_bytes()


# ------------------------------------------------------------------------- several true replies, and labels of replies


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier that knows the words of happy and of sad sentences."""
    folder = tmp_path_factory.mktemp("trained")
    pairs = [("how lovely and great", "happy"), ("i am so sorry", "sad"), ("yuck it is gross", "disgust")] * 30
    train_emotion_classifier(folder, *map(list, zip(*pairs, strict=True)), steps=60, progress=False)
    return str(folder)


def test_the_emotion_of_replies_is_compared_with_the_label_of_the_true_reply(trained):
    said = ["how lovely and great", "i am so sorry", "", "yuck it is gross"]
    labels = ["happy", "happy", "sad", None]
    replies = {name: rows(texts, ["how lovely and great"] * 4) for name, texts in (("a", said), ("b", said[::-1]))}
    for those in replies.values():
        for row, label in zip(those, labels, strict=True):
            row["reply_emotion"] = label
    scoring = Scoring(metrics=["emotion_score", "reply_emotion"], classifier=trained, resamples=50, device="cpu")
    found = score_replies(replies, scoring, [("a", "b")])
    assert found["systems"]["a"]["metrics"]["reply_emotion"]["mean"] == pytest.approx(1 / 3)  # empty is wrong
    assert found["systems"]["b"]["metrics"]["reply_emotion"]["mean"] == pytest.approx(1 / 3)
    assert "3 labeled replies" in found["computed_by"]["reply_emotion"]
    assert found["computed_by"]["reply_emotion"].endswith("it is 0.667")  # two of the three true replies are happy
    assert [row["metric"] for row in found["comparisons"]] == ["emotion_score", "reply_emotion"]
    assert "reply_emotion" not in found["systems"]["a"]["histograms"]
    for those in replies.values():
        for row in those:
            del row["reply_emotion"]
    assert score_replies(replies, scoring, [])["skipped"] == {"reply_emotion": "no true reply has an emotion label"}


def test_the_most_similar_of_several_references_counts(trained):
    scoring = Scoring(
        metrics=["emotion_score"], classifier=trained, pooling="probabilities", resamples=50, device="cpu"
    )
    alone = rows(["how lovely and great"] * 4, ["i am so sorry"] * 4)
    several = [{**row, "references": ["yuck it is gross", "how lovely and great"]} for row in alone]
    one, best = (score_replies({"a": those}, scoring, []) for those in (alone, several))
    assert one["systems"]["a"]["metrics"]["emotion_score"]["mean"] < 0.95
    assert best["systems"]["a"]["metrics"]["emotion_score"]["mean"] == pytest.approx(1, abs=1e-6)
    assert best["computed_by"]["emotion_score"].endswith("the most similar of up to 3 acceptable replies")


def test_references_and_labels_reach_the_command(base_folder, options, tmp_path, capsys):
    systems = [f"a=empathic:{base_folder}"]
    line = [*systems, *options, "--metrics", "emotion_score", "reply_emotion", f"--output={tmp_path}"]
    assert main(["evaluate", "dialogue", *line]) == 0
    plain = json.loads((tmp_path / "dialogue.json").read_text())
    assert plain["systems"]["a"]["metrics"]["reply_emotion"]["mean"] >= 0  # clara's turns are labeled replies too
    assert "Response-emotion accuracy" in capsys.readouterr().out
    ids = [row["id"] for row in read_replies(tmp_path / "dialogue" / "a.jsonl")]
    file = tmp_path / "references.jsonl"
    file.write_text("".join(json.dumps({"id": name, "references": ["how are you"]}) + "\n" for name in ids[:2]))
    assert main(["evaluate", "dialogue", *line, f"--references={file}"]) == 0
    results = json.loads((tmp_path / "dialogue.json").read_text())
    assert "up to 2 acceptable replies" in results["computed_by"]["emotion_score"]
    assert results["settings"]["references"] == str(file)
    score = "emotion_score"
    assert results["systems"]["a"]["metrics"][score]["mean"] >= plain["systems"]["a"]["metrics"][score]["mean"]
    for content, message in (("{", ":1: is not"), ('{"id": "x", "references": [""]}', ":1: references are ['']")):
        file.write_text(content)
        assert main(["evaluate", "dialogue", *line, f"--references={file}"]) == 1
        assert message in capsys.readouterr().err


def test_labels_of_classifiers_are_grouped():
    assert set(emotion_of_labels(["anger", "annoyance", "disgust", "fear", "joy", "neutral", "grief", "surprise"])) == {
        "angry", "disgust", "fearful", "happy", "neutral", "sad", "surprise",
    }  # fmt: skip
    assert emotion_of_labels(["happy", "sad", "angry", "disgust", "fear", "neutral", "surprised", "x"])[-1] is None
    with pytest.raises(ValueError, match="do not name angry"):
        emotion_of_labels(["good", "bad"])

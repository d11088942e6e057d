"""The modules of `evaluate`: loaded as users load them, against other libraries and numbers worked by hand."""

import doctest
import json
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from empathic.cli import main
from empathic.commands import push_metric
from empathic.configuration_empathic import EMOTIONS
from empathic.evaluation import metrics
from empathic.evaluation.modules.bertscore.bert_similarity import BertScore
from empathic.tiny.dialogues import emotion_sentences
from empathic.tiny.emotion_classifier import train_emotion_classifier

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "evaluation" / "modules"
NAMES = ("bertscore", "bleu", "dist_n", "emotion_accuracy", "emotion_score")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier in RoBERTa's format, a little trained; BERTScore takes it for its RoBERTa."""
    folder = tmp_path_factory.mktemp("classifier")
    train_emotion_classifier(folder, *zip(*emotion_sentences(400), strict=True), steps=60, progress=False)
    return str(folder)


@pytest.fixture(scope="module")
def modules():
    assert push_metric.names() == sorted(
        path.name for path in MODULES.iterdir() if path.is_dir() and path.name[0] != "_"
    )
    return {name: evaluate.load(str(MODULES / name)) for name in NAMES}


TEXTS = ["I am so happy for you!", "the old dog", "what a sad day, I am sorry about the long and empty house"]
OTHERS = ["that is great", "the old dog", "no"]


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_example_does_what_it_says(name, classifier, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (MODULES / name / "README.md").read_text(encoding="utf-8")
    for model in ("SamLowe/roberta-base-go_emotions", "roberta-large"):  # not to be had here
        for quote in ('"{}"', "'{}'", "'{}, pooling"):
            text = text.replace(quote.format(model), quote.format(classifier))
    text = text.replace("layer=17", "layer=1").replace("'layer 17'", "'layer 1'")
    example = doctest.DocTestParser().get_doctest(text, {}, name, f"{name}/README.md", 0)
    assert len(example.examples) >= 4
    assert doctest.DocTestRunner().run(example).failed == 0
    for word in ("Definition", "Source", "Range", "Worked example", "Limits"):
        assert f"**{word}.**" in text


def test_dist_n_by_hand(modules):
    # a b a b: pairs ab ba ab, triples aba bab; "x y z!": x y z ! all different; "hm": no pair
    replies = ["a b a b", "x y z!", "Hm"]
    one = modules["dist_n"].compute(predictions=replies)
    assert one["scores"] == [2 / 4, 1.0, 1.0] and one["dist_n"] == pytest.approx(2.5 / 3)
    assert one["corpus_dist_n"] == 7 / 9
    two = modules["dist_n"].compute(predictions=replies, n=2)
    assert two["scores"] == [2 / 3, 1.0, None] and two["dist_n"] == pytest.approx((2 / 3 + 1) / 2)
    assert two["corpus_dist_n"] == 5 / 6
    assert modules["dist_n"].compute(predictions=replies, n=3)["scores"] == [1.0, 1.0, None]
    assert modules["dist_n"].compute(predictions=["a b", ""], allow_empty=True)["scores"] == [1.0, 0.0]
    with pytest.raises(ValueError, match="No reply has 5 tokens"):
        modules["dist_n"].compute(predictions=replies, n=5)
    with pytest.raises(ValueError, match="n is 0"):
        modules["dist_n"].compute(predictions=replies, n=0)


def test_emotion_accuracy_equals_scikit_learns(modules):
    rng = np.random.default_rng(0)
    true = rng.choice(EMOTIONS[:5], 200).tolist()
    named = [label if rng.random() < 0.6 else str(rng.choice(EMOTIONS)) for label in true]
    found = modules["emotion_accuracy"].compute(predictions=named, references=true, labels=list(EMOTIONS))
    present = sorted(set(true))
    assert found["accuracy"] == pytest.approx(accuracy_score(true, named))
    assert found["mean_recall"] == pytest.approx(recall_score(true, named, labels=present, average="macro"))
    recalls = recall_score(true, named, labels=present, average=None)
    assert [found["recall"][label] for label in present] == pytest.approx(recalls.tolist())
    assert found["recall"][EMOTIONS[6]] is None
    table = confusion_matrix(true, named, labels=list(EMOTIONS))
    assert [[found["confusion"][a][b] for b in EMOTIONS] for a in EMOTIONS] == table.tolist()
    without = modules["emotion_accuracy"].compute(predictions=named, references=true)
    assert without["labels"] == present and without["accuracy"] == found["accuracy"]


def test_bleu_by_hand_with_several_references(modules):
    # Of "the the the cat" two "the" are in the second text and one "cat" in the first: 3 of 4 words. Pairs: "the the"
    # twice, "the cat" once; one "the the" and one "the cat" match: 2 of 3. Three words are nearest to four: no penalty.
    rows = dict(predictions=["the the the cat"], references=[["the cat is", "the the dog sleeps in here"]])
    found = modules["bleu"].compute(**rows)
    assert found["bleu_1"] == pytest.approx(3 / 4) and found["brevity_penalty"] == 1.0
    assert metrics.bleu(rows["predictions"], rows["references"], 2) == pytest.approx((3 / 4 * 2 / 3) ** 0.5)
    # Rows with one reference and with two: words 3 of 4 and 2 of 3; 7 words for 3 + 4, so no penalty.
    more = modules["bleu"].compute(
        predictions=["the the the cat", "we met here"], references=[*rows["references"], "we met in oslo"]
    )
    assert more["bleu_1"] == pytest.approx(5 / 7)
    short = modules["bleu"].compute(predictions=["we met"], references=["we met in oslo"])
    assert short["brevity_penalty"] == pytest.approx(np.exp(1 - 4 / 2)) == pytest.approx(short["bleu_1"])


def test_bleu_equals_sacrebleus_of_the_corpus(modules):
    from sacrebleu import corpus_bleu

    predictions, references = [*TEXTS, "the old dog of clara is here"], [*OTHERS, "the old cat of clara is here"]
    found = modules["bleu"].compute(predictions=predictions, references=references)
    assert found["bleu_4"] * 100 == pytest.approx(corpus_bleu(predictions, [references]).score)


def classifier_outputs(folder, text):
    """Of transformers alone, one text at a time: last layer (tokens, dim), probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0].softmax(-1)


@pytest.mark.parametrize("pooling", ["mean", "cls", "probabilities"])
def test_emotion_score_equals_transformers_alone(modules, classifier, pooling):
    def features(text):
        hidden, probabilities = classifier_outputs(classifier, text)
        return {"mean": hidden.mean(0), "cls": hidden[0], "probabilities": probabilities}[pooling].double()

    expected = [
        torch.cosine_similarity(features(a), features(b), dim=0).item() for a, b in zip(TEXTS, OTHERS, strict=True)
    ]
    found = modules["emotion_score"].compute(
        predictions=TEXTS, references=OTHERS, model=classifier, pooling=pooling, batch_size=2
    )
    assert found["scores"] == pytest.approx(expected, abs=1e-5)
    assert found["emotion_score"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert found["settings"] == f"{classifier}, pooling {pooling}"
    assert expected[1] == pytest.approx(1) and expected[0] < 0.999


def bert_score(folder, layer, text, reference):
    """Precision, recall and F1 of a pair from the model's vectors."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for words in (text, reference):
        ids = tokenizer(" " + words, return_tensors="pt")  # bert-score writes the first word like any other
        with torch.no_grad():
            vectors.append(normalize(model(**ids, output_hidden_states=True).hidden_states[layer][0], dim=-1))
    cosines = vectors[0] @ vectors[1].T  # (tokens, reference's tokens), with the marks at both ends
    precision, recall = cosines.max(1).values[1:-1].mean().item(), cosines.max(0).values[1:-1].mean().item()
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("layer", [1, 2])
def test_bertscore_equals_a_computation_from_the_models_vectors(modules, classifier, layer):
    expected = np.array([bert_score(classifier, layer, a, b) for a, b in zip(TEXTS, OTHERS, strict=True)])
    found = modules["bertscore"].compute(
        predictions=TEXTS, references=OTHERS, model=classifier, layer=layer, batch_size=2
    )
    assert found["scores"] == pytest.approx(expected[:, 2].tolist(), abs=1e-5)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(expected.mean(0), abs=1e-5)
    assert expected[1] == pytest.approx(1) and expected[0, 2] < 0.999
    assert f"{classifier}, layer {layer}" in found["settings"]


def test_of_several_references_the_best_counts(modules, classifier):
    for name, options in (("emotion_score", {}), ("bertscore", {"layer": 1})):
        compute = partial(modules[name].compute, predictions=TEXTS, model=classifier, **options)

        def scores(references, compute=compute):
            return compute(references=references)["scores"]

        first, second = scores(OTHERS), scores(OTHERS[::-1])
        assert first != second
        both = scores([list(pair) for pair in zip(OTHERS, OTHERS[::-1], strict=True)])
        assert both == pytest.approx(np.maximum(first, second).tolist(), abs=1e-6)
        assert scores([OTHERS[0], [OTHERS[1]], [OTHERS[2]]]) == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), [("emotion_score", {}), ("bertscore", {"layer": 2})])
def test_the_model_is_loaded_once(modules, classifier, tmp_path, name, options):
    folder = shutil.copytree(classifier, tmp_path / "model")
    rows = dict(predictions=TEXTS, references=OTHERS, model=str(folder), **options)
    first = modules[name].compute(**rows)
    shutil.rmtree(folder)
    assert modules[name].compute(**rows) == first
    if name == "emotion_score":  # nor for other features of the same model
        assert modules[name].compute(**rows, pooling="cls")["scores"] != first["scores"]


def test_an_empty_reply_counts_as_nothing_where_that_is_asked_for(modules, classifier):
    rows = dict(predictions=["the old dog", " "], references=["the old dog", "no"], allow_empty=True)
    for name, options in (("emotion_score", {}), ("bertscore", {"layer": 1})):
        assert modules[name].compute(**rows, model=classifier, **options)["scores"] == pytest.approx([1, 0], abs=1e-5)
    assert modules["bleu"].compute(**rows)["bleu_1"] == pytest.approx(np.exp(1 - 4 / 3))  # 3 words for 3 + 1
    rows["references"] = ["the old dog", "sad"]
    assert modules["emotion_accuracy"].compute(**rows)["accuracy"] == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_row_and_leave_the_module_usable(modules, classifier, name):
    metric = modules[name]
    options = {"emotion_score": {"model": classifier}, "bertscore": {"model": classifier, "layer": 1}}.get(name, {})

    def compute(predictions, references):
        if name == "dist_n":
            return metric.compute(predictions=predictions)
        return metric.compute(predictions=predictions, references=references, **options)

    good = compute(["sad", "happy"], ["sad", "sad"])
    cases = [
        (["a", None], ["sad", "sad"], "predictions, row 1: None is not a string"),
        ([7, "a"], ["sad", "sad"], "predictions, row 0: 7 is not a string"),
        (["a", " "], ["sad", "sad"], r"predictions, row 1: the text is empty \(' '\)"),
        ([], [], "predictions is an empty list"),
        ("sad", ["sad"], "give a list of strings"),
    ]
    if name != "dist_n":
        cases += [
            (["a", "b"], ["sad", ""], "references, row 1: the text is empty"),
            (["a", "b"], ["sad", 7], "references, row 1: 7 is not a string"),
            (["a", "b"], ["sad"], "2 predictions but 1 references"),
        ]
    if name not in ("dist_n", "emotion_accuracy"):
        cases += [
            (["a", "b"], ["sad", ["b", None]], "references, row 1, number 1: None is not a string"),
            (["a", "b"], [[], ["b"]], "references, row 0: the list is empty"),
        ]
    for predictions, references, message in cases:
        with pytest.raises(ValueError, match=message):
            compute(predictions, references)
        assert compute(["sad", "happy"], ["sad", "sad"]) == good


def test_rows_may_come_one_after_the_other(modules):
    whole = modules["bleu"].compute(predictions=TEXTS, references=OTHERS)
    modules["bleu"].add(prediction=TEXTS[0], reference=OTHERS[0])
    with pytest.raises(ValueError, match="predictions, row 2: None is not a string"):
        modules["bleu"].add_batch(predictions=["a", None], references=["a", "b"])
    modules["bleu"].add_batch(predictions=TEXTS[1:], references=[[text] for text in OTHERS[1:]])
    assert modules["bleu"].compute() == whole


def test_a_model_that_is_not_to_be_had_is_named(modules, classifier, tmp_path):
    with pytest.raises(ValueError, match="The pooling 'max' is not one of mean, cls, head, probabilities"):
        modules["emotion_score"].compute(predictions=["a"], references=["a"], model=classifier, pooling="max")
    with pytest.raises(RuntimeError, match=r"bert-score knows no layer for .*give one"):
        modules["bertscore"].compute(predictions=["a"], references=["a"], model=classifier)
    with pytest.raises(RuntimeError, match="layer 9, cannot be loaded"):
        modules["bertscore"].compute(predictions=["a"], references=["a"], model=classifier, layer=9)
    with pytest.raises(RuntimeError, match="absent, layer 1, cannot be loaded"):
        BertScore(str(tmp_path / "absent"), 1)


def test_texts_longer_than_the_models_positions_are_cut(classifier):
    scorer = BertScore(classifier, 1)
    assert scorer.score(["the old dog " * 100], ["the old dog " * 120]) == 1.0
    assert scorer.score(["the old dog", ""], ["the old dog", "no"]) == pytest.approx(0.5)


def push(*arguments):
    """`empathic push-metric`; returns its exit status."""
    return main(["push-metric", *arguments])


SPACES = """
import json, sys
sys.modules["empathic"] = None  # importing it is an error
import evaluate
load = lambda name: evaluate.load(f"me/{name}", module_type="metric")
classifier, rows = sys.argv[1], dict(predictions=["a b b", "c"], references=["a b c", ["d", "c"]])
print(json.dumps({
    "dist_n": load("dist_n").compute(predictions=rows["predictions"]),
    "bleu": load("bleu").compute(**rows),
    "emotion_accuracy": load("emotion_accuracy").compute(predictions=["a", "c"], references=["a", "b"]),
    "emotion_score": load("emotion_score").compute(**rows, model=classifier),
    "bertscore": load("bertscore").compute(**rows, model=classifier, layer=1),
}))
"""


@pytest.mark.slow
def test_spaces_hold_all_that_their_metric_needs(modules, classifier, hub, tmp_path, capsys):
    """Pushed by the command, loaded from the Hub by a process that has no `empathic`: the same numbers as from here."""
    for name in NAMES:
        assert push(name, f"me/{name}", "--public") == 0
        assert f"{name} is at {hub.url}/spaces/me/{name}" in capsys.readouterr().out
        files = hub.files(f"me/{name}", "space")
        assert {f"{name}.py", "app.py", "README.md", "requirements.txt", "checked_texts.py", "space.py"} <= set(files)
        assert files["checked_texts.py"] == (MODULES / "checked_texts.py").read_bytes()  # not the link's path
    done = subprocess.run(
        [sys.executable, "-c", SPACES, classifier], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    rows = dict(predictions=["a b b", "c"], references=["a b c", ["d", "c"]])
    assert found["dist_n"] == modules["dist_n"].compute(predictions=rows["predictions"])
    assert found["bleu"] == modules["bleu"].compute(**rows)
    assert found["emotion_accuracy"]["accuracy"] == 0.5
    assert found["emotion_score"] == modules["emotion_score"].compute(**rows, model=classifier)
    assert found["bertscore"] == modules["bertscore"].compute(**rows, model=classifier, layer=1)


def test_a_space_must_bear_the_metrics_name(hub, capsys):
    assert push("bleu", "me/our-bleu") == 1
    assert "must be called bleu" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_page_of_a_space(name, tmp_path, monkeypatch):
    """`app.py` as it is pushed, called over HTTP. Needs gradio, which the extra `dev` brings."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    folder = shutil.copytree(MODULES / name, tmp_path / "app")  # a Space's files lie in a folder of another name
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "space", raising=False)
    demo = runpy.run_path(str(folder / "app.py"))["demo"]
    assert len(demo.input_components) == (1 if name == "dist_n" else 2) and "**Range.**" in demo.article
    if name != "bleu":
        return
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(url, verbose=False)
        result = client.predict("the cat\nwe met", "the dog\nwe sat || we met", api_name="/compute")
        assert result["bleu_1"] == pytest.approx(3 / 4)
        with pytest.raises(Exception, match="row 1: the text is empty"):
            client.predict("the cat\n\nwe met", "a\nb\nc", api_name="/compute")
    finally:
        demo.close()

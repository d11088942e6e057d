"""Results that the Hub shows on the model's page, read back with its own client."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from empathic.cli import main
from empathic.hub.eval_results import EVAL_RESULTS, eval_results
from empathic.hub.model_card import write_card, write_record

RUN = {
    **{"stage": "dialogue", "start": None, "parts": None, "eval_split": "validation", "trained_parameters": 10},
    **{"learning_rate": 1e-4, "samples_per_step": 8, "processes": 1, "seed": 1, "precision": "fp32", "settings": {}},
    **{"steps": 5, "metrics": {"train_loss": 1.0, "eval_loss": 0.5}},
    "versions": {"empathic": "0.1.0", "transformers": "5.24.0"},
}


def data(id):
    return [{"name": id or "recordings", "id": id, "license": None, "terms": None}]


@pytest.fixture
def folder(base_folder, tmp_path):
    return shutil.copytree(base_folder, tmp_path / "model")


def test_results_on_data_of_the_hub_are_pushed_and_removed_with_them(folder, hub):
    results = {"emotion": {"AVT": 0.9}, "dialogue": {"epo": {"dist1": 0.7}}}
    write_record(folder, {"runs": [{**RUN, "data": data("me/meld")}], "results": results})
    write_card(folder)
    assert main(["push", str(folder), "me/chatbot"]) == 0
    files = hub.files("me/chatbot")
    entries = parse_eval_result_entries(yaml.safe_load(files[EVAL_RESULTS]))
    assert {(entry.dataset_id, entry.task_id): entry.value for entry in entries} == {
        ("me/meld", "emotion_from_a_v_t"): 0.9,
        ("me/meld", "dist1_of_replies"): 0.7,
        ("me/meld", "eval_loss_stage_dialogue"): 0.5,
    }
    assert all("empathic 0.1.0, transformers 5.24.0" in entry.notes for entry in entries)
    assert "split test" in entries[-1].notes
    # The card has the same results, beside the losses on training data.
    card = ModelCard(files["README.md"].decode())
    assert {result.metric_value for result in card.data.eval_results} == {0.9, 0.7, 0.5, 1.0}
    assert "This card was written by version " in card.text and "Last stage with empathic 0.1.0," in card.text

    write_record(folder, {"runs": [{**RUN, "data": data(None)}]})
    assert main(["push", str(folder), "me/chatbot"]) == 0
    assert EVAL_RESULTS not in hub.files("me/chatbot")


def test_results_on_local_data_name_no_benchmark(folder):
    write_record(folder, {"runs": [{**RUN, "data": data(None)}], "results": {"emotion": {"AVT": 0.9}}})
    assert eval_results(folder) == {}
    write_record(folder, {"runs": [{**RUN, "data": data("squad")}]})  # an id without an owner is no repository of today
    assert eval_results(folder) == {}
    (folder / "empathic_runs.json").write_text(json.dumps({"runs": []}))
    assert eval_results(folder) == {}

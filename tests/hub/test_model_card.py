"""The record of a model's runs and the model card made from it."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from empathic.hub.model_card import (
    HERE,
    RUNS_FILE,
    data_facts,
    folder_card,
    hub_id,
    is_ours,
    kept_card,
    model_card,
    quality,
    read_record,
    write_card,
    write_record,
)
from empathic.hub.models import push_model
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.trainers.checkpoints.pushing import check_base
from empathic.trainers.checkpoints.stage_folder import merge

PARTS = {"text": "Qwen/Qwen2.5-7B-Instruct", "vision": "openai/clip-vit-base-patch32", "audio": None, "memory": "s/m"}
MELD = {"name": "MELD", "id": None, "license": "gpl-3.0", "terms": "Scenes of a television series."}


def a_run(stage="emotion", **changes):
    return {
        "stage": stage,
        "start": None,
        "parts": None,
        "data": [MELD],
        "eval_split": "dev",
        "trained_parameters": 1234567,
        "learning_rate": 1e-4,
        "samples_per_step": 64,
        "processes": 2,
        "strategy": "zero2",
        "seed": 42,
        "precision": "bf16, frozen weights in bfloat16",
        "settings": {"warmup_steps": 0.03},
        "steps": 1000,
        "metrics": {"train_loss": 0.5, "eval_loss": 0.25},
        "versions": {"transformers": "5"},
    } | changes


RUNS = [
    a_run(parts=PARTS),
    a_run("epo", start="me/dialogue", data=[{"name": "me/pairs", "id": "me/pairs", "license": None, "terms": None}],
          metrics={"eval_rewards/accuracies": 0.9}, settings={"beta": 2.0, "lora_r": 128}),
]  # fmt: skip


def test_a_card_says_how_the_model_came_about():
    text = model_card(RUNS, "me/chatbot", kind="adapter", base="me/memory")
    card = ModelCard(text)
    data = card.data
    assert data.base_model == ["me/memory", "me/dialogue", *(name for name in PARTS.values() if name)]
    assert data.base_model_relation == "adapter" and data.datasets == ["me/pairs"]
    assert (data.library_name, data.pipeline_tag, data.language) == ("transformers", "any-to-any", "en")
    assert data.license == "other" and data.model_name == "chatbot"
    found = {(r.dataset_type, r.dataset_split, r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ("meld", "train", "loss", "train_loss, stage emotion"): 0.5,
        ("meld", "dev", "loss", "eval_loss, stage emotion"): 0.25,
        ("me/pairs", "dev", "accuracy", "eval_rewards/accuracies, stage epo"): 0.9,
    }
    for said in (
        "| emotion | MELD | 1,000 | 64 | 0.0001 | 1,234,567 |",
        "zero2, 2 processes",
        "`lora_r` 128",
        "audio (a local model)",
        "Scenes of a television series.",
        'name = "me/chatbot"',
        "Kim, Park, Ro",
        "| me/pairs | dev |",
    ):
        assert said in card.text, said
    assert is_ours(text)


def test_what_was_measured_on_held_out_data():
    results = {
        "emotion": {"AVT": 0.9},
        "reconstruction": {"5": {"bleu1": 0.8}},
        "dialogue": {"epo": {"dist1": 0.7}, "text": {"dist1": 0.1}},
        "seconds": {"corpus": 3},
    }
    found = ModelCard(model_card(RUNS, "me/x", results=results)).data.eval_results
    held_out = {(r.metric_type, r.metric_name): r.metric_value for r in found if r.dataset_split == "test"}
    assert held_out == {
        ("accuracy", "emotion from A+V+T"): 0.9,
        ("bleu1", "bleu1, 5 utterances rebuilt"): 0.8,
        ("dist1", "dist1 of replies"): 0.7,
    }


def test_a_model_without_a_record():
    card = ModelCard(model_card([], HERE))
    assert "no record" in card.text and card.data.base_model is None and card.data.eval_results is None


def test_only_what_tells_of_quality_is_a_metric():
    metrics = {"train_loss": 1.0, "train_runtime": 3.0, "eval_loss": float("nan"), "eval_rewards/margins": 2.0}
    metrics |= {"eval_samples_per_second": 1.0, "epoch": 1.0, "loss": 3.0, "memory_gib": 1.0, "eval_runtime": 2.0}
    assert quality(metrics) == {"train_loss": 1.0, "eval_rewards/margins": 2.0}


def test_folders_of_this_machine_are_no_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "emotion").mkdir(parents=True)
    names = ["runs/emotion", "./a", "../a/b", "/a/b", "a/b/c", str(tmp_path), None, "runs/other", "gpt2"]
    assert [hub_id(name) for name in names] == [None] * 7 + ["runs/other", "gpt2"]
    for base in ("runs/emotion", "../x", {"text": "a/b", "audio": "runs/emotion", "num_frames": 8}):
        with pytest.raises(ValueError, match=r"starts from .*--hub_base ID.*empathic merge"):
            check_base(base, None)
        check_base(base, "me/base")
    check_base("a/b", None)
    with pytest.raises(ValueError, match="runs/emotion is not a Hub id"):
        check_base("a/b", "runs/emotion")


def test_data_is_called_as_its_card_calls_it(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert data_facts(str(folder)) == {"name": "data", "id": None, "license": None, "terms": None}
    (folder / "README.md").write_text(
        "---\nlicense: gpl-3.0\npretty_name: MELD\n---\n"
        "# Else\n\n## Licence\n\nScenes of a\ntelevision series.\n\nMore\n"
    )
    assert data_facts(str(folder)) == MELD
    (folder / "README.md").write_text("---\nconfigs: []\n---\n# Pairs\n")
    assert data_facts(str(folder))["name"] == "Pairs"


def test_a_card_changed_by_hand_stays(tmp_path):
    card = tmp_path / "README.md"
    write_record(tmp_path, {"runs": RUNS[:1]})
    write_card(tmp_path)
    first = card.read_text()
    write_record(tmp_path, {"runs": RUNS})
    write_card(tmp_path)
    assert card.read_text() != first and "`epo`" in card.read_text()
    for changed in (card.read_text().replace("Kim", "Kym"), "# Mine\n", card.read_text() + "More.\n"):
        card.write_text(changed)
        write_card(tmp_path)
        assert card.read_text() == changed and not is_ours(changed)
    card.write_text("# Model Card for Model ID\n")  # PEFT's template
    write_card(tmp_path)
    assert is_ours(card.read_text())


def test_peft_leaves_the_card_alone(tmp_path, model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    for text in (None, "# Mine\n"):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        with kept_card(tmp_path):
            adapted.save_pretrained(tmp_path)
            assert (tmp_path / "README.md").read_text() != text
        assert (tmp_path / "README.md").exists() == (text is not None)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_merged_model_keeps_the_record_of_all_stages(base_folder, tmp_path):
    stage = shutil.copytree(base_folder, tmp_path / "stage")
    write_record(stage, {"runs": RUNS})
    merge(str(stage), str(tmp_path / "whole"))
    assert read_record(str(tmp_path / "whole")) == {"runs": RUNS}
    text = (tmp_path / "whole" / "README.md").read_text()
    assert text == folder_card(tmp_path / "whole") and "`emotion`" in text and "`epo`" in text
    assert str(tmp_path) not in text and "whole model" in text
    merge(base_folder, str(tmp_path / "unknown"))
    assert "no record" in (tmp_path / "unknown" / "README.md").read_text()


def test_on_the_hub_the_card_names_its_id_and_yields_to_one_changed_there(hub, base_folder, tmp_path):
    from huggingface_hub import HfApi

    folder = shutil.copytree(base_folder, tmp_path / "model")
    write_record(folder, {"runs": RUNS})
    write_card(folder)
    push_model(folder, "me/chatbot")
    there = hub.files("me/chatbot")
    assert (
        RUNS_FILE in there and b'name = "me/chatbot"' in there["README.md"] and HERE.encode() not in there["README.md"]
    )
    assert HERE in (folder / "README.md").read_text()
    write_record(folder, {"runs": RUNS[:1]})
    push_model(folder, "me/chatbot")
    assert b"- `epo`: " in there["README.md"]
    assert b"- `epo`: " not in hub.files("me/chatbot")["README.md"]  # rewritten from the record
    HfApi().upload_file(path_or_fileobj=b"# Mine, there\n", path_in_repo="README.md", repo_id="me/chatbot")
    push_model(folder, "me/chatbot")
    assert hub.files("me/chatbot")["README.md"] == b"# Mine, there\n"
    (folder / "README.md").write_text("# Mine, here\n")
    push_model(folder, "me/chatbot")
    assert hub.files("me/chatbot")["README.md"] == b"# Mine, here\n"
    shutil.copytree(base_folder, tmp_path / "other")
    push_model(tmp_path / "other", "me/chatbot")
    assert RUNS_FILE not in hub.files("me/chatbot")  # it described the previous model


def test_the_snippet_is_python():
    code = re.search(r"```python\n(.*?)```", model_card([], "me/x"), re.DOTALL)[1]
    compile(code, "card", "exec")
    assert json.dumps("me/x") in code and "trust_remote_code=True" in code
    assert EmpathicForConditionalGeneration.__name__ not in code  # the auto classes are enough

"""Options of transformers and TRL: each has an effect or is refused by name; YAML values are what they mean."""

import dataclasses

import pytest
from trl import ModelConfig

from empathic.baselines.train import BaselineConfig
from empathic.trainers import EPOConfig, options, train
from empathic.trainers.compat import TrainingArguments
from empathic.trainers.options import (
    LORA_OPTIONS,
    MODEL_OPTIONS,
    QUANTIZATION_OPTIONS,
    UNUSED_EVERYWHERE,
    UNUSED_IN_BASELINES,
    UNUSED_IN_EPO,
    UNUSED_IN_STAGES,
    USED_OPTIONS,
    check_model_options,
)
from empathic.trainers.stages import StageConfig

CONFIGS = {EPOConfig: UNUSED_IN_EPO, StageConfig: UNUSED_IN_STAGES, BaselineConfig: UNUSED_IN_BASELINES}


def test_every_option_of_transformers_and_trl_is_decided():
    """A new version with a new option fails here: find out whether the trainers use it, and add it to a table."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert inherited <= USED_OPTIONS | UNUSED_EVERYWHERE.keys()
    assert not USED_OPTIONS & UNUSED_EVERYWHERE.keys()
    assert set().union(*CONFIGS.values()) <= inherited  # no name is misspelled
    models = {field.name for field in dataclasses.fields(ModelConfig)}
    assert models == {*MODEL_OPTIONS, *LORA_OPTIONS, *QUANTIZATION_OPTIONS, "use_peft", "lora_task_type"}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, unused in CONFIGS.items() for name in unused])
def test_an_option_without_an_effect_is_refused_by_name(tmp_path, kind, name):
    default = next(field for field in dataclasses.fields(kind) if field.name == name).default
    value = (not default) if isinstance(default, bool) else ["loss"] if name == "include_for_metrics" else "7"
    with pytest.raises(ValueError, match=rf"^{name} is .*has no effect: .*Leave {name} out"):
        kind(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_option_that_nobody_has_checked_is_refused_only_when_it_is_set(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(options, "USED_OPTIONS", USED_OPTIONS - {"run_name"})
    kind(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"run_name is 'mine', but has no effect: transformers .* has this option"):
        kind(output_dir=str(tmp_path), use_cpu=True, run_name="mine")


def test_arguments_can_be_copied(tmp_path):
    for kind in CONFIGS:
        dataclasses.replace(kind(output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch", seed=3), seed=4)


@pytest.mark.parametrize("changes, message", [
    ({"lora_task_type": "SEQ_CLS"}, "lora_task_type is 'SEQ_CLS'"),
    ({"use_bnb_nested_quant": True}, "use_bnb_nested_quant is True.*needs load_in_4bit"),
    ({"model_revision": "v2"}, "model_revision is 'v2'.*four parts has no revisions"),
    ({"model_revision": "v2", "model_name_or_path": "."}, r"model_revision is 'v2'.*the folder \. has no revisions"),
])  # fmt: skip
def test_an_option_of_the_model_without_an_effect_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_model_options(ModelConfig(**changes))


def test_options_of_a_new_adapter_or_model_are_refused_where_none_is_made(base_folder, tmp_path):
    given = ["--dataset_name", "none", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    given += ["--model_name_or_path", base_folder]
    with pytest.raises(ValueError, match=r"lora_r is 8, .*stage emotion trains no adapter"):
        train.main(["--stage", "emotion", *given, "--lora_r", "8"])
    with pytest.raises(ValueError, match=r"qformer_layers is 2, .* has its own value"):
        train.main(["--stage", "emotion", *given, "--qformer_layers", "2"])
    with pytest.raises(ValueError, match=r"lora_dropout is 0\.2, .*disable_dropout"):
        train.main(["--stage", "epo", *given, "--lora_dropout", "0.2"])
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        train.main(["--stage", "emotion", *given, "--remove_unused_columns", "True"])


# -------------------------------------------------------------------------------------------------------------- YAML


def parse(tmp_path, **changes):
    lines = {"stage": "dialogue", "dataset_name": "[a]", "output_dir": str(tmp_path), "use_cpu": "true", **changes}
    (tmp_path / "c.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return train.parse(["--config", str(tmp_path / "c.yaml")])


def test_yaml_values_are_what_they_mean(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    script, args, model_args = parse(
        tmp_path, save_strategy="no", eval_strategy="off", report_to="no", max_steps="4.0", lora_r="4.0", bf16="0",
        learning_rate="1e-3", dataset_weights="[1e0, 2]", feature_cache="~/x", dataset_name="[~/y, \"'z'\"]",
        model_name_or_path="~/m", max_utterances="null",
    )  # fmt: skip
    assert (args.save_strategy, args.eval_strategy, args.report_to) == ("no", "no", [])
    assert (args.max_steps, args.learning_rate, args.bf16, model_args.lora_r) == (4, 0.001, False, 4)
    assert type(args.max_steps) is type(model_args.lora_r) is int and args.max_utterances is None
    assert script.feature_cache == f"{tmp_path}/x" and model_args.model_name_or_path == f"{tmp_path}/m"
    assert script.dataset_name == [f"{tmp_path}/y", "z"] and script.dataset_weights == [1.0, 2.0]


@pytest.mark.parametrize("changes, message", [
    ({"max_steps": "4.5"}, r"max_steps is 4\.5\. Give a whole number"),
    ({"max_steps": "yes"}, "max_steps is True, which is how YAML reads yes"),
    ({"run_name": "no"}, 'run_name is False.*in quotes, `run_name: "no"`'),
    ({"model_revision": "1234"}, 'model_revision is the number 1234.*in quotes: `model_revision: "1234"`'),
    ({"bf16": "7"}, "bf16 is 7. Give true or false"),
    ({"reply_speakers": "[no]"}, "reply_speakers is False"),
    ({"dataset_weights": "[much]"}, "dataset_weights has the item 'much'. Give a number"),
    ({"learning_rate": "{a: 1}"}, r"learning_rate is \{'a': 1\}. Give a number"),
    ({"max_steps": ""}, "max_steps is empty"),
])  # fmt: skip
def test_a_yaml_value_that_cannot_be_meant_names_its_key(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, **changes)

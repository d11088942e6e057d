"""Merging folders that no stage has written."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from empathic.cli import main
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers import EPOConfig, EPOTrainer


@pytest.fixture
def trained(base_folder, tmp_path):
    """The folder of an `EPOTrainer` that has trained an adapter, and the trainer."""
    pair = {"prompt": "hello there", "chosen": "i am fine", "rejected": "the old dog"}
    rows = [{"prompt": [{"role": "user", "content": pair["prompt"]}]}]
    rows[0] |= {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    args = EPOConfig(
        output_dir=str(tmp_path / "epo"),
        learning_rate=0.1,
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = EPOTrainer(
        EmpathicForConditionalGeneration.from_pretrained(base_folder),
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=EmpathicProcessor.from_pretrained(base_folder),
        peft_config=LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False),
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "epo", trainer


def test_the_folder_of_an_epo_trainer_is_merged(trained, tmp_path):
    folder, trainer = trained
    assert main(["merge", str(folder), str(tmp_path / "whole")]) == 0
    merged = EmpathicForConditionalGeneration.from_pretrained(tmp_path / "whole").state_dict()
    expected = trainer.model.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in expected.items())
    EmpathicProcessor.from_pretrained(tmp_path / "whole")


def test_an_adapter_of_another_kind_of_model_is_named(trained, parts, tmp_path, capsys):
    folder, _ = trained
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, message in ((parts["text"], "is a model of type"), (None, "names the base")):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        assert main(["merge", str(folder), str(tmp_path / "whole")]) == 1
        error = capsys.readouterr().err
        assert message in error and str(folder) in error and not (tmp_path / "whole").exists()

"""The folders that stages leave: the parts they trained, their adapter, and the name of their base."""

import json
import os
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import Trainer
from transformers.dynamic_module_utils import custom_object_save

from empathic.composition_empathic import (
    ADAPTER_CONFIG,
    PARTS_FILE,
    PRETRAINED_PREFIXES,
    STAGE_FILE,
    find_file,
    load_parts,
    read_stage,
    resolve_base,
)
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor


def load_model(path: str, trainable: bool = False, **kwargs):
    """
    A model from a whole checkpoint or a stage's folder. A stage's adapter comes as a `PeftModel`, so that it can be
    trained on or merged.

    Args:
        path: folder or Hub id.
        trainable: whether the adapter, where there is one, goes on training.
        kwargs: of `from_pretrained`, such as `dtype` and `attn_implementation`.
    """
    if find_file(path, ADAPTER_CONFIG) is None:
        return EmpathicForConditionalGeneration.from_pretrained(path, **kwargs)
    base = resolve_base(path, read_stage(path)["base"])
    return PeftModel.from_pretrained(load_model(base, **kwargs), path, is_trainable=trainable)


def merge(path: str, output: str, **kwargs) -> None:
    """Writes one whole model, adapters merged and all parts in place, with its processor and code."""
    model = load_model(path, **kwargs)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(output)
    EmpathicProcessor.from_pretrained(path).save_pretrained(output)


def _relative(base: str, folder: str) -> str:
    """A local folder as seen from `folder`, so that both can be moved together; a Hub id as it is."""
    return os.path.relpath(base, folder) if Path(base).is_dir() else base


class StageRecord:
    """
    What a stage's folder says of itself beside its weights.

    Args:
        stage: the stage's name.
        base: the folder or Hub id it started from, or the four parts as a dict.
        trained: names of the tensors it trained (none for an adapter).
    """

    def __init__(self, stage: str, base: str | dict, trained: list[str]):
        self.stage, self.base, self.trained = stage, base, trained

    def save(self, model: EmpathicForConditionalGeneration, folder: str) -> None:
        """Writes the stage file, the config and the code, so that `from_pretrained` loads the folder as it is."""
        base = self.base
        if isinstance(base, str):
            base = _relative(base, folder)
        else:
            base = {key: _relative(value, folder) if isinstance(value, str) else value for key, value in base.items()}
        record = {"stage": self.stage, "base": base, "trained": self.trained}
        custom_object_save(model, folder, config=model.config)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        # Written last: a folder that names its stage is complete.
        Path(folder, STAGE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class StageSaving:
    """Mixin over `Trainer`: saves and resumes the parts that a stage trains instead of the whole model."""

    stage_record: StageRecord

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir if output_dir is not None else self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                self.stage_record.save(model.get_base_model(), output_dir)
            return
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        state = model.state_dict() if state_dict is None else state_dict
        tensors = {name: state[name].detach().cpu().contiguous() for name in self.stage_record.trained}
        save_file(tensors, os.path.join(output_dir, PARTS_FILE), metadata={"format": "pt"})
        self.processing_class.save_pretrained(output_dir)
        torch.save(self.args, os.path.join(output_dir, "training_args.bin"))
        self.stage_record.save(model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        if isinstance(target, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_parts(target, resume_from_checkpoint, self.stage_record.trained)


class StageTrainer(StageSaving, Trainer):
    """`transformers.Trainer` for the supervised stages."""


def new_tensors(model: EmpathicForConditionalGeneration) -> list[str]:
    """Names of the tensors that no pretrained part brought; the first stage on composed parts saves them all."""
    return [name for name, _ in model.named_parameters() if not name.startswith(PRETRAINED_PREFIXES)]

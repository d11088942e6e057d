"""The folders that stages leave: the parts they trained, their adapter, and the name of their base."""

import json
import os
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers.dynamic_module_utils import custom_object_save

from empathic.composition_empathic import (
    ADAPTER_CONFIG,
    PRETRAINED_PREFIXES,
    STAGE_FILE,
    find_file,
    load_adapter,
    read_stage,
    resolve_base,
)
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers.model_card import read_record, write_card, write_record

UNFINISHED = "_unfinished-"  # what a folder is called while it is written; pushes leave out what begins with "_"


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
    record = read_stage(path)
    if record is None:
        raise ValueError(f"{path} has an adapter but no {STAGE_FILE} that names its base: the folder is incomplete.")
    base, adapted = load_model(resolve_base(path, record["base"]), **kwargs), []
    load_adapter(base, path, lambda: adapted.append(PeftModel.from_pretrained(base, path, is_trainable=trainable)))
    return adapted[0]


def merge(path: str, output: str, **kwargs) -> None:
    """
    Writes one whole model, adapters merged and all parts in place, with its processor, code and card.

    Args:
        path: a stage's folder or Hub id.
        output: a new folder. It is written beside its place and moved there at the end.
        kwargs: of `from_pretrained`; `dtype` is what the model is merged and saved in, by default that of the base.

    Raises:
        FileExistsError: `output` is there and not empty.
    """
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{output} is there already: name a new folder, or remove it first.")
    model = load_model(path, **kwargs)
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        model.save_pretrained(unfinished)
        EmpathicProcessor.from_pretrained(path).save_pretrained(unfinished)
        write_record(str(unfinished), read_record(path))
        write_card(str(unfinished))
        os.replace(unfinished, target)


def _relative(base: str, folder: str) -> str:
    """A local folder as seen from `folder`, so that both can be moved together; a Hub id as it is."""
    # Through links, as the way from the folder goes: `runs` may be a link to a larger disk.
    return os.path.relpath(os.path.realpath(base), os.path.realpath(folder)) if Path(base).is_dir() else base


class StageRecord:
    """
    What a stage's folder says of itself beside its weights.

    Args:
        stage: the stage's name.
        base: the folder or Hub id it started from, or the four parts as a dict.
        trained: names of the tensors it trained (none for an adapter).
        runs: the record of the runs up to this one, see `model_card`; with it the folder gets a card.
    """

    def __init__(self, stage: str, base: str | dict, trained: list[str], runs: list[dict] | None = None):
        self.stage, self.base, self.trained, self.runs = stage, base, trained, runs

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
        if self.runs is not None:
            write_record(folder, {"runs": self.runs})
        # A folder that names its stage is complete; its card reads it.
        unfinished = Path(folder, f"{STAGE_FILE}.tmp")
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, Path(folder, STAGE_FILE))
        if self.runs is not None:
            write_card(folder)


def new_tensors(model: EmpathicForConditionalGeneration) -> list[str]:
    """Names of the tensors that no pretrained part brought; the first stage on composed parts saves them all."""
    return [name for name, _ in model.named_parameters() if not name.startswith(PRETRAINED_PREFIXES)]

"""The output folders of stages, with the trained parts or adapter and the name of the base."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import custom_object_save

from ...composition_empathic import (
    ADAPTER_CONFIG,
    PART_NAMES,
    PRETRAINED_PREFIXES,
    REPOSITORY_KEYS,
    STAGE_FILE,
    find_file,
    load_adapter,
    read_stage,
    resolve_base,
)
from ...errors import loading
from ...files import write_json
from ...hub.model_card import read_record, write_card, write_record
from ...modeling_empathic import EmpathicForConditionalGeneration
from ...processing_empathic import EmpathicProcessor

UNFINISHED = "_unfinished-"  # prefix of a folder while it is written; pushes skip names that start with "_"


def load_model(path: str, trainable: bool = False, **kwargs) -> Any:
    """
    Load a model from a whole checkpoint or a stage's folder. A stage with an adapter gives a `PeftModel`, which can be
    trained further or merged.

    Args:
        path: folder or Hub id.
        trainable: whether the adapter, if there is one, is trained further.
        kwargs: arguments of `from_pretrained`, such as `dtype`, `attn_implementation` and `revision`.
    """
    own = {key: kwargs.pop(key) for key in REPOSITORY_KEYS if key in kwargs}
    own = {key: value for key, value in own.items() if value is not None}
    if find_file(path, ADAPTER_CONFIG, **own) is None:
        return EmpathicForConditionalGeneration.from_pretrained(path, **own, **kwargs)
    base, revision = base_of_adapter(path, **own)
    model, adapted = load_model(base, revision=revision, **kwargs), []

    def load():
        adapted.append(PeftModel.from_pretrained(model, path, is_trainable=trainable, **own))

    load_adapter(model, path, load, **own)
    return adapted[0]


def base_of_adapter(path: str, **hub) -> tuple[str, str | None]:
    """
    Return the base of a folder or repository with an adapter, and its revision on the Hub, or None for its newest. The
    stage file names the base; without one, as for an adapter that an `EPOTrainer` has saved, the adapter does.

    Raises:
        ValueError: if no base is named, or the base is no model of this package.
    """
    record = read_stage(path, **hub)
    if record is not None:
        return resolve_base(path, record["base"]), record.get("base_revision")
    config = json.loads(Path(find_file(path, ADAPTER_CONFIG, **hub)).read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise ValueError(
            f"{path} has an adapter, but neither a {STAGE_FILE} nor its {ADAPTER_CONFIG} names the base. Add "
            f"base_model_name_or_path to {ADAPTER_CONFIG}."
        )
    file = find_file(base, "config.json", revision=revision)
    if file is None:
        raise ValueError(f"{path} has an adapter of {base}, which has no config.json. Restore this base.")
    kind = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
    if kind != EmpathicForConditionalGeneration.config_class.model_type:
        raise ValueError(
            f"{path} has an adapter of {base}, which is a model of type {kind}, not of this package. Merge it with "
            "PEFT: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()."
        )
    return os.path.abspath(base) if os.path.isdir(base) else base, revision


def merge(path: str, output: str, **kwargs) -> None:
    """
    Write a stage as one whole model, with merged adapters and all parts, and with its processor, code and card.

    Args:
        path: a stage's folder or Hub id.
        output: a new folder. The model is written to a temporary folder, which is renamed at the end.
        kwargs: arguments of `from_pretrained`; the model is merged and saved in `dtype`, by default the base's dtype.

    Raises:
        FileExistsError: if `output` exists and is not empty.
    """
    with _new_folder(output) as unfinished:
        model = _load_merged(path, **kwargs)
        model.save_pretrained(unfinished)
        EmpathicProcessor.from_pretrained(path).save_pretrained(unfinished)
        write_record(str(unfinished), read_record(path))
        write_card(str(unfinished))


def export_language_model(path: str, output: str, **kwargs) -> None:
    """
    Write the language model alone, with merged adapters and its tokenizer, in the format of its own family: for an
    engine that runs language models, which then gets the prompts as embeddings.

    Args:
        path: a whole model or a stage's folder, or a Hub id.
        output: a new folder, see `merge`.
        kwargs: arguments of `from_pretrained`, see `merge`.

    Raises:
        FileExistsError: if `output` exists and is not empty.
    """
    with _new_folder(output) as unfinished:
        model = _load_merged(path, **kwargs)
        with torch.device("meta"):  # its own weights are replaced
            alone = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
        setattr(alone, alone.base_model_prefix, model.model.language_model)
        alone.set_output_embeddings(model.lm_head)
        alone.generation_config = model.generation_config
        alone.save_pretrained(unfinished)
        EmpathicProcessor.from_pretrained(path).tokenizer.save_pretrained(unfinished)


def _load_merged(path: str, **kwargs) -> Any:
    with loading(path):
        model = load_model(path, **kwargs)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


@contextmanager
def _new_folder(output: str) -> Iterator[Path]:
    """Within, write to a temporary folder; it becomes the new folder `output` at the end."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{output} already exists: name a new folder, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # The temporary folder is created first: a folder that cannot be written is noticed before the model is loaded.
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=target.parent) as folder:
        unfinished = Path(folder, target.name)
        yield unfinished
        try:
            os.replace(unfinished, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # another run was faster
                raise FileExistsError(f"{output} already exists: name a new folder, or remove it first.") from error
            raise


def _relative(base: str, folder: str) -> str:
    """Make a local path relative to `folder`, so that both can be moved together; a Hub id is unchanged."""
    # Links are resolved, because the relative path is: `runs` may be a link to a larger disk.
    return os.path.relpath(os.path.realpath(base), os.path.realpath(folder)) if Path(base).is_dir() else base


class StageRecord:
    """
    The metadata of a stage's folder: its stage, base, trained tensors and runs.

    Args:
        stage: the stage's name.
        base: the folder or Hub id that the stage started from, or the four parts as a dict.
        trained: names of the trained tensors (none for an adapter).
        runs: the record of all runs including this one, see `model_card`; if given, the folder gets a card.
        base_revision: the revision of the base on the Hub; None for its newest.
    """

    def __init__(
        self,
        stage: str,
        base: str | dict,
        trained: list[str],
        runs: list[dict] | None = None,
        base_revision: str | None = None,
    ):
        self.stage, self.base, self.trained, self.runs = stage, base, trained, runs
        self.base_revision = base_revision

    def save(self, model: EmpathicForConditionalGeneration, folder: str) -> None:
        """Write the stage file, the config and the code, so that `from_pretrained` can load the folder."""
        base = self.base
        if isinstance(base, str):
            base = _relative(base, folder)
        else:
            base = base | {name: _relative(base[name], folder) for name in PART_NAMES}
        record = {"stage": self.stage, "base": base, "trained": self.trained}
        if self.base_revision is not None:
            record["base_revision"] = self.base_revision
        custom_object_save(model, folder, config=model.config)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if self.runs is not None:
            write_record(folder, {"runs": self.runs})
        # The stage file marks a complete folder, so it comes last; only the card, which reads it, comes later.
        write_json(Path(folder, STAGE_FILE), record)
        if self.runs is not None:
            write_card(folder)


def new_tensors(model: EmpathicForConditionalGeneration) -> list[str]:
    """Return the names of all tensors that are in no pretrained part; the first stage on new parts saves them all."""
    return [name for name, _ in model.named_parameters() if not name.startswith(PRETRAINED_PREFIXES)]

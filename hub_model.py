"""Pushing a whole model or a stage's folder to the Hub."""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from empathic.composition_empathic import ADAPTER_CONFIG, PARTS_FILE, STAGE_FILE, resolve_base
from empathic.hub import CARD, Patterns, PushError, kind_of, push_files, read_json, select_files
from empathic.processing_empathic import TASKS
from empathic.trainers.model_card import EMPTY_CARD, RUNS_FILE, folder_card, is_ours

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
PROCESSOR_FILES = (
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "memory_tokenizer/tokenizer.json",
    "memory_tokenizer/tokenizer_config.json",
    "chat_template.jinja",
    *(f"additional_chat_templates/{task}.jinja" for task in TASKS if task != "dialogue"),
)

# What is pushed beside the tensors and the code.
MODEL_FILES: Patterns = {
    "": ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", CARD),
    "memory_tokenizer": ("*.json", "*.model", "merges.txt", "vocab.txt"),
    "additional_chat_templates": ("*.jinja",),
}
# No part of the model, or named with its tensors.
OF_THE_RUN = ("trainer_state.json", "checkpoint_complete.json", "*_results.json", "*.index.json")
# Left by an earlier push, these would be loaded in place of the new, or beside it.
MODEL_STALE: Patterns = {
    "": ("*.safetensors", WEIGHTS_INDEX, STAGE_FILE, RUNS_FILE, ADAPTER_CONFIG, "*_empathic.py", "chat_template.jinja"),
    "additional_chat_templates": ("*.jinja",),
}
# Of a checkpoint: a pickle that may hold the token, and a card that stands one folder higher.
NOT_OF_A_CHECKPOINT = ("training_args.bin", CARD)


def model_kind(folder: Path) -> str | None:
    """`stage`, also of one that lacks something, `model`, or None."""
    there = set(os.listdir(folder))
    if {STAGE_FILE, PARTS_FILE} & there or (ADAPTER_CONFIG in there and not {WEIGHTS, WEIGHTS_INDEX} & there):
        return "stage"
    config = folder / "config.json"
    return "model" if config.is_file() and read_json(config).get("model_type") == "empathic" else None


def push_model(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = True,
    base: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    checkpoints: Mapping[str, Path] | None = None,
) -> str:
    """
    Pushes a whole model or a stage's folder; `AutoModelForMultimodalLM.from_pretrained(repo_id,
    trust_remote_code=True)` loads it.

    Weights, config, generation config, code files, both tokenizers, chat templates and the card are pushed;
    checkpoints, optimizer states and training arguments are not. A card that was written from the run names the model
    by its id; one that somebody has changed goes as it is, and one that was changed on the Hub stays as it is there.

    Args:
        folder: of `save_pretrained`, `empathic merge` or a training stage.
        repo_id: `owner/name` of the model on the Hub; made if it is not there.
        base: of a stage that stands on a folder: the Hub id under which that base was pushed. The pushed files name it.
        private, token, revision, commit_message: see `hub.push_dataset`.
        checkpoints: of a stage: folders in the repository, and the checkpoints that go there whole, in the same commit.

    Returns:
        The address of the model.

    Raises:
        PushError: for a folder that is no complete model or stage, naming what is missing; for a stage whose base is a
            folder, without `base`; or for a Hub that does not take it.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind not in ("stage", "model"):
        raise PushError(f"{folder}: holds a data set, not a model. Push it with `hub.push_dataset`.")
    if base is not None and kind == "model":
        raise PushError(f"{folder}: is a whole model and has no base; leave `base` out.")
    others = [
        name
        for name in select_files(folder, MODEL_FILES)
        if not any(fnmatchcase(name, pattern) for pattern in OF_THE_RUN)
    ]
    names = [*_check_complete(folder, kind), *_code_files(folder), *others]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    if kind == "stage":
        files |= _with_base(folder, base)
    stale = dict(MODEL_STALE)
    for place, checkpoint in (checkpoints or {}).items():
        files |= {f"{place}/{name}": content for name, content in _checkpoint_files(checkpoint, base).items()}
        stale |= dict.fromkeys(_folders_there(place, repo_id, token, revision), ("*",))
    if CARD in files:
        files |= _card(folder, files.pop(CARD), repo_id, base, token, revision)
    return push_files(
        files,
        stale,
        repo_id,
        repo_type="model",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message or f"Push {kind}",
        needs=() if base is None else (base,),
    )


def _check_complete(folder: Path, kind: str) -> list[str]:
    """Raises for a folder that is no complete model or stage; returns the files that hold its tensors."""
    needed = ["config.json", "generation_config.json", *PROCESSOR_FILES]
    weights: dict[str, list[str]] = {}  # the tensors that a file must hold
    if kind == "stage":
        needed.append(STAGE_FILE)
        record = read_json(folder / STAGE_FILE) if (folder / STAGE_FILE).is_file() else {}
        if record.get("trained"):
            weights[PARTS_FILE] = record["trained"]
        if (folder / ADAPTER_CONFIG).is_file() or not weights:
            needed.append(ADAPTER_CONFIG)
            weights[ADAPTER] = []
    elif (folder / ADAPTER_CONFIG).is_file():
        raise PushError(f"{folder}: holds a whole model and an adapter beside it. Merge the adapter into it first.")
    elif (folder / WEIGHTS_INDEX).is_file() and not (folder / WEIGHTS).is_file():
        for tensor, file in read_json(folder / WEIGHTS_INDEX)["weight_map"].items():
            weights.setdefault(file, []).append(tensor)
    else:
        weights[WEIGHTS] = []
    missing = [name for name in [*needed, *weights] if not (folder / name).is_file()]
    if missing:
        raise PushError(f"{folder}: is no complete {kind}: there is no {', no '.join(missing)}.")
    for name, tensors in weights.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                absent = sorted(set(tensors) - set(file.keys()))
        except SafetensorError as error:
            raise PushError(f"{folder / name}: is not a whole safetensors file ({error}).") from error
        if absent:
            raise PushError(f"{folder / name}: lacks {len(absent)} tensors that it should hold, such as {absent[0]}.")
    return [*weights, *([WEIGHTS_INDEX] if kind == "model" and WEIGHTS not in weights else [])]


def _code_files(folder: Path) -> list[str]:
    """The modules that the configs name, and those that they import from beside them."""
    names = {reference for file in ("config.json", "processor_config.json") for reference in _references(folder / file)}
    checked: set[str] = set()
    while names - checked:
        name = min(names - checked)
        path = folder / f"{name}.py"
        if not path.is_file():
            raise PushError(
                f"{folder}: is no complete model: there is no {name}.py, the code that it loads with. Save it again "
                "with `save_pretrained`."
            )
        checked.add(name)
        names |= set(get_relative_imports(path))
    return sorted(f"{name}.py" for name in checked)


def _references(path: Path) -> list[str]:
    """The modules that a config's `auto_map` names, and without one those that every checkpoint has."""
    classes = read_json(path).get("auto_map") or {}
    if not classes:
        raise PushError(
            f"{path}: names no code to load with (`auto_map`), so it would load only where this package is installed. "
            "Save the model and its processor again with `save_pretrained`."
        )
    return [name.split("--")[-1].split(".")[0] for name in classes.values()]


def local_bases(base: str | dict, folder: str | os.PathLike = ".") -> list[str]:
    """What is a folder of this machine in a stage's base, which may be relative to the stage's own `folder`."""
    parts = [value for value in base.values() if isinstance(value, str)] if isinstance(base, dict) else [base]
    return [part for part in parts if part.startswith((".", "/")) or Path(resolve_base(str(folder), part)).is_dir()]


def _card(
    folder: Path, path: Path, repo_id: str, base: str | None, token: str | None, revision: str | None
) -> dict[str, str | bytes]:
    """The card under its name, written anew for the place it goes to; nothing where it has nothing to say there."""
    text = path.read_text(encoding="utf-8")
    if EMPTY_CARD in text:
        return {}
    if not is_ours(text):
        return {CARD: text.encode()}
    try:
        there = hf_hub_download(repo_id, CARD, revision=revision, token=token or get_token() or False)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, ValueError):  # ValueError: no id
        there = None
    if there is not None and not is_ours(Path(there).read_text(encoding="utf-8")):
        return {}
    return {CARD: folder_card(folder, repo_id, base).encode()}


def _checkpoint_files(checkpoint: Path, base: str | None) -> dict[str, Path | bytes]:
    """All that a run needs to go on, as it can be read anywhere."""
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in NOT_OF_A_CHECKPOINT
    }
    state = {**read_json(checkpoint / "trainer_state.json"), "best_model_checkpoint": None}  # a path of this machine
    files["trainer_state.json"] = (json.dumps(state, indent=2) + "\n").encode()
    return files | _with_base(checkpoint, base)


def _folders_there(place: str, repo_id: str, token: str | None, revision: str | None) -> set[str]:
    """A folder of a repository and those in it; DeepSpeed names some by the step, and the old ones have to go."""
    try:
        names = HfApi(token=token or get_token() or False).list_repo_files(repo_id, revision=revision)
    except HfHubHTTPError:  # not there yet; anything else meets the push itself
        return set()
    return {name.rpartition("/")[0] for name in names if name.startswith(f"{place}/")}


def _with_base(folder: Path, base: str | None) -> dict[str, bytes]:
    """The files of a stage that name its base, with the name that it has on the Hub."""
    record = read_json(folder / STAGE_FILE)
    named = record["base"]
    local = local_bases(named, folder)
    if base is None and local:
        raise PushError(
            f"{folder}: the stage {record['stage']!r} stands on a folder of this machine, {local[0]}, which is not on "
            f"the Hub. Make one model of it (`empathic merge {folder} OUT`) and push that; or push its base first, and "
            "give its id as `base` (`--base ID`)."
        )
    base = named if base is None else base
    files = {STAGE_FILE: {**record, "base": base}}
    if (folder / ADAPTER_CONFIG).is_file():
        if isinstance(base, dict):
            raise PushError(
                f"{folder}: its adapter stands on four parts that are no model yet. Make one model of it (`empathic "
                f"merge {folder} OUT`) and push that."
            )
        files[ADAPTER_CONFIG] = {**read_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": base}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}

"""Push a whole model or a stage folder to the Hub."""

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib.metadata import requires
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from packaging.requirements import Requirement
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

from ..composition_empathic import ADAPTER_CONFIG, PART_NAMES, PARTS_FILE, STAGE_FILE, resolve_base
from ..processing_empathic import TASKS
from .client import CARD, Patterns, PushError, push_files, read_json, select_files
from .eval_results import EVAL_RESULTS, eval_results
from .kinds import WEIGHTS, WEIGHTS_INDEX, kind_of
from .model_card import EMPTY_CARD, RUNS_FILE, folder_card, is_ours

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

# Files that are pushed in addition to the tensors and the code.
MODEL_FILES: Patterns = {
    "": ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", CARD),
    "memory_tokenizer": ("*.json", "*.model", "merges.txt", "vocab.txt"),
    "additional_chat_templates": ("*.jinja",),
}
# Files that are not part of the model, or that are selected together with the tensors.
OF_THE_RUN = ("trainer_state.json", "checkpoint_complete.json", "*_results.json", "*.index.json")
# Files of an earlier push that would be loaded instead of, or together with, the new files.
MODEL_STALE: Patterns = {
    "": ("*.safetensors", WEIGHTS_INDEX, STAGE_FILE, RUNS_FILE, ADAPTER_CONFIG, "*_empathic.py", "chat_template.jinja"),
    "additional_chat_templates": ("*.jinja",),
    str(PurePosixPath(EVAL_RESULTS).parent): (PurePosixPath(EVAL_RESULTS).name,),
}
HANDLER = Path(__file__).parents[1] / "serve" / "handler.py"
# Checkpoint files that are not pushed: a pickle that may contain the token, and a card that the parent folder has too.
NOT_OF_A_CHECKPOINT = ("training_args.bin", CARD)


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
    handler: bool = False,
) -> str:
    """
    Push a whole model or a stage folder; `AutoModelForMultimodalLM.from_pretrained(repo_id, trust_remote_code=True)`
    loads it.

    Weights, config, generation config, code files, both tokenizers, chat templates and the card are pushed;
    checkpoints, optimizer states and training arguments are not. An automatically written card is updated with the Hub
    id. A card that was changed by hand is pushed unchanged, and a card that was changed on the Hub is kept.

    Args:
        folder: the output folder of `save_pretrained`, `empathic merge` or a training stage.
        repo_id: `owner/name` of the model on the Hub; created if it does not exist.
        base: the Hub id of a stage's base, needed if the stage's base is a folder. The pushed files name this id.
        private, token, revision, commit_message: see `hub.push_dataset`.
        checkpoints: maps folders in the repository to a stage's checkpoints, which are pushed in the same commit.
        handler: also push a `handler.py` and its requirements, with which Inference Endpoints run the model.

    Returns:
        The URL of the model.

    Raises:
        PushError: if the folder is not a complete model or stage (the message names what is missing), if a stage's base
            is a folder and `base` is not given, or if the Hub rejects the push.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    if kind not in ("stage", "model"):
        raise PushError(f"{folder}: holds a data set, not a model. Push it with `hub.push_dataset`.")
    if base is not None and kind == "model":
        raise PushError(f"{folder}: is a whole model and has no base. Leave `base` out.")
    others = [
        name
        for name in select_files(folder, MODEL_FILES)
        if not any(fnmatchcase(name, pattern) for pattern in OF_THE_RUN)
    ]
    names = [*_check_complete(folder, kind), *_code_files(folder), *others]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files |= eval_results(folder)
    if kind == "stage":
        files |= _with_base(folder, base)
    if handler:
        files |= _handler_files()
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


def _handler_files() -> dict[str, Path | bytes]:
    """Return the handler for Inference Endpoints, and what the model's code needs there."""
    found = [Requirement(line) for line in requires("empathic") or []]
    lines = [f"{line.name}{line.specifier}\n" for line in found if line.marker is None and line.name != "torch"]
    return {"handler.py": HANDLER, "requirements.txt": "".join(lines).encode()}


def _check_complete(folder: Path, kind: str) -> list[str]:
    """Raise a PushError for an incomplete model or stage; return the files with its tensors."""
    needed = ["config.json", "generation_config.json", *PROCESSOR_FILES]
    weights: dict[str, list[str]] = {}  # the required tensors of each file
    if kind == "stage":
        needed.append(STAGE_FILE)
        record = read_json(folder / STAGE_FILE) if (folder / STAGE_FILE).is_file() else {}
        if record.get("trained"):
            weights[PARTS_FILE] = record["trained"]
        if (folder / ADAPTER_CONFIG).is_file() or not weights:
            needed.append(ADAPTER_CONFIG)
            weights[ADAPTER] = []
    elif (folder / ADAPTER_CONFIG).is_file():
        raise PushError(f"{folder}: holds a whole model and also an adapter. Merge the adapter into the model first.")
    elif (folder / WEIGHTS_INDEX).is_file() and not (folder / WEIGHTS).is_file():
        for tensor, file in read_json(folder / WEIGHTS_INDEX)["weight_map"].items():
            weights.setdefault(file, []).append(tensor)
    else:
        weights[WEIGHTS] = []
    missing = [name for name in [*needed, *weights] if not (folder / name).is_file()]
    if missing:
        raise PushError(f"{folder}: is not a complete {kind}: there is no {', no '.join(missing)}. Save it again.")
    for name, tensors in weights.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                absent = sorted(set(tensors) - set(file.keys()))
        except SafetensorError as error:
            raise PushError(f"{folder / name}: is not a complete safetensors file ({error}). Save it again.") from error
        if absent:
            raise PushError(f"{folder / name}: lacks {len(absent)} tensors, such as {absent[0]}. Save it again.")
    return [*weights, *([WEIGHTS_INDEX] if kind == "model" and WEIGHTS not in weights else [])]


def _code_files(folder: Path) -> list[str]:
    """Return the code files of the modules that the configs name, and of the modules that they import relatively."""
    names = {reference for file in ("config.json", "processor_config.json") for reference in _references(folder / file)}
    checked: set[str] = set()
    while names - checked:
        name = min(names - checked)
        path = folder / f"{name}.py"
        if not path.is_file():
            raise PushError(
                f"{folder}: is not a complete model: there is no {name}.py, which is needed to load it. Save it again "
                "with `save_pretrained`."
            )
        checked.add(name)
        names |= set(get_relative_imports(path))
    return sorted(f"{name}.py" for name in checked)


def _references(path: Path) -> list[str]:
    """Return the modules that a config's `auto_map` names; a PushError without `auto_map`."""
    classes = read_json(path).get("auto_map") or {}
    if not classes:
        raise PushError(
            f"{path}: names no code (`auto_map`), so it can only be loaded if this package is installed. Save the "
            "model and its processor again with `save_pretrained`."
        )
    return [name.split("--")[-1].split(".")[0] for name in classes.values()]


def local_bases(base: str | dict, folder: str | os.PathLike = ".") -> list[str]:
    """Return the local folders in a stage's base; they may be relative to the stage's own `folder`."""
    parts = [base[name] for name in PART_NAMES if name in base] if isinstance(base, dict) else [base]
    return [part for part in parts if part.startswith((".", "/")) or Path(resolve_base(str(folder), part)).is_dir()]


def _card(
    folder: Path, path: Path, repo_id: str, base: str | None, token: str | None, revision: str | None
) -> dict[str, str | bytes]:
    """Return the card to push, rewritten for the Hub id; empty for PEFT's template or a card changed on the Hub."""
    text = path.read_text(encoding="utf-8")
    if EMPTY_CARD in text:
        return {}
    if not is_ours(text):
        return {CARD: text.encode()}
    try:
        there = hf_hub_download(repo_id, CARD, revision=revision, token=token or get_token() or False)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, ValueError):  # ValueError: invalid id
        there = None
    if there is not None and not is_ours(Path(there).read_text(encoding="utf-8")):
        return {}
    return {CARD: folder_card(folder, repo_id, base).encode()}


def _checkpoint_files(checkpoint: Path, base: str | None) -> dict[str, Path | bytes]:
    """Return the files that a run needs to resume from a checkpoint, without paths of this machine."""
    files: dict[str, Path | bytes] = {
        path.relative_to(checkpoint).as_posix(): path
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in NOT_OF_A_CHECKPOINT
    }
    state = {**read_json(checkpoint / "trainer_state.json"), "best_model_checkpoint": None}  # it is a local path
    files["trainer_state.json"] = (json.dumps(state, indent=2) + "\n").encode()
    return files | _with_base(checkpoint, base)


def _folders_there(place: str, repo_id: str, token: str | None, revision: str | None) -> set[str]:
    """Return a folder of a repository and its subfolders, to remove them. DeepSpeed names some after the step."""
    try:
        names = HfApi(token=token or get_token() or False).list_repo_files(repo_id, revision=revision)
    except HfHubHTTPError:  # the repository does not exist yet; the push itself reports any other error
        return set()
    return {name.rpartition("/")[0] for name in names if name.startswith(f"{place}/")}


def _with_base(folder: Path, base: str | None) -> dict[str, bytes]:
    """Return the files of a stage that name its base, with the Hub id of the base."""
    record = read_json(folder / STAGE_FILE)
    named = record["base"]
    local = local_bases(named, folder)
    if base is None and local:
        raise PushError(
            f"{folder}: the stage {record['stage']!r} has a local folder as its base, {local[0]}, which is not on the "
            f"Hub. Merge it into a whole model (`empathic merge {folder} OUT`) and push that; or push its base first, "
            "and give its id as `base` (`--base ID`)."
        )
    # Another base has other revisions.
    revision = {"base_revision": None} if base is not None and base != named else {}
    base = named if base is None else base
    files = {STAGE_FILE: {**record, "base": base, **({} if record.get("base_revision") is None else revision)}}
    if (folder / ADAPTER_CONFIG).is_file():
        if isinstance(base, dict):
            raise PushError(
                f"{folder}: the base of its adapter is four parts, not a whole model. Merge it into a whole model "
                f"(`empathic merge {folder} OUT`) and push that."
            )
        files[ADAPTER_CONFIG] = {**read_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": base}
        if revision:
            files[ADAPTER_CONFIG]["revision"] = None
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}

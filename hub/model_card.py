"""The record of the training runs of a model, which is passed from stage to stage, and the model card made from it."""

import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import DatasetCard, EvalResult, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from peft import __version__ as peft_version
from torch import __version__ as torch_version
from transformers import __version__ as transformers_version

from ..composition_empathic import ADAPTER_CONFIG, PART_NAMES, STAGE_FILE, find_file
from .client import CARD

RUNS_FILE = "empathic_runs.json"  # {"runs": [first stage's run, ..., last stage's run], "results": of `quickstart`}
HERE = "path/of/this/folder"  # name of the model in a card that is not on the Hub
EMPTY_CARD = "# Model Card for Model ID"  # heading of the empty template that PEFT saves with an adapter
# The last line of a card. Its digest shows whether the card was changed after it was written.
MARK = "<!-- Written by `empathic` ({digest}). A card that was changed by hand is left as it is. -->"
MARK_LINE = re.compile(re.escape(MARK).replace(re.escape("{digest}"), "([0-9a-f]{16})") + r"\n\Z")

TITLE = "Empathetic Response in Audio-Visual Conversations Using Emotion Preference Optimization and MambaCompressor"
STAGE_TEXTS = {
    "emotion": "the Q-formers, their queries and projectors learn to name the emotion of a clip",
    "memory_single": "the MambaCompressor learns to store an utterance in its memory vector",
    "memory_multi": "the MambaCompressor learns to store conversations as memory vectors",
    "dialogue": "a LoRA adapter of the language model learns to reply, given the audio, the video and the memory",
    "epo": "the adapter learns to prefer replies with the right emotion (Emotional Preference Optimization)",
}
# Settings of a run that the card lists in addition to the columns of its table, if the run has them.
COMMON = ("lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "max_length", "history")
STAGE_SETTINGS = {
    "emotion": (),
    "memory_single": (),
    "memory_multi": ("single_ratio", "max_utterances"),
    "dialogue": ("use_media", "rebuild_ratio", "max_utterances"),
    "epo": ("beta", "gamma", "nll_weight", "epo_weight", "disable_dropout"),
}
LORA = ("lora_r", "lora_alpha", "lora_dropout", "load_in_4bit")
NO_METRIC = re.compile(r".*(_runtime|_per_second|_gib|_flos|_time|epoch|step)$")


# --------------------------------------------------------------------------------------------------------- the record


def hub_id(name: str | None) -> str | None:
    """Return the name if it is a Hub id and not a local folder, else None."""
    is_id = name is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id else None


def read_record(path: str, **hub) -> dict:
    """Read `runs` (empty if there is no record) and `results` of a folder or Hub repository."""
    file = find_file(str(path), RUNS_FILE, **hub)
    return {"runs": []} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def write_record(folder: str | os.PathLike, record: dict) -> None:
    """Write the record that `read_record` reads."""
    Path(folder, RUNS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def data_facts(name: str) -> dict:
    """Return the `name`, `id` (None for a folder), `license` and `terms` of a data set; the card may lack some."""
    facts = {"name": hub_id(name) or Path(name).resolve().name, "id": hub_id(name), "license": None, "terms": None}
    path = Path(name, CARD)
    if facts["id"] is None and not path.is_file():
        return facts
    try:
        card = DatasetCard.load(path if facts["id"] is None else name, ignore_metadata_errors=True)
    except (HfHubHTTPError, OSError, ValueError):  # no card, or no access to it: the run continues without the facts
        return facts
    heading = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    title = card.data.pretty_name or (heading[1] if heading else None)
    if facts["id"] is None and title:
        facts["name"] = title
    terms = re.split(r"^## Licen[cs]e\n", card.text, maxsplit=1, flags=re.MULTILINE)[1:]
    terms = terms[0].strip().split("\n\n")[0] if terms else ""
    return facts | {"license": card.data.license, "terms": " ".join(terms.split()) or None}


def new_run(script, args, model_args, start: str | dict, num_trained: int) -> dict:
    """
    Describe a stage's run at its start, without naming local folders.

    Args:
        script, args, model_args: the arguments as `trainers.train` parses them.
        start: the folder or Hub id that the stage starts from, or the four parts.
        num_trained: number of trained parameters.
    """
    values = {**vars(model_args), **args.to_dict()}
    names = [*COMMON, *STAGE_SETTINGS[script.stage], *(LORA if model_args.use_peft else ())]
    settings = {name: values[name] for name in names if values.get(name) is not None}
    if script.dataset_weights is not None:
        settings["dataset_weights"] = script.dataset_weights
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return {
        "stage": script.stage,
        "start": hub_id(start) if isinstance(start, str) else None,
        "parts": {name: hub_id(start[name]) for name in PART_NAMES if name in start}
        if isinstance(start, dict)
        else None,
        "data": [data_facts(name) for name in script.dataset_name],
        "eval_split": script.eval_split[0] if script.eval_split and args.eval_strategy != "no" else None,
        "trained_parameters": num_trained,
        "learning_rate": args.learning_rate,
        "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
        "seed": args.seed,
        "precision": f"{precision}, frozen weights in {model_args.dtype or 'float32'}",
        "settings": settings,
        "steps": 0,
        "metrics": {},
        "versions": {
            "empathic": own_version(),
            "transformers": transformers_version,
            "peft": peft_version,
            "torch": str(torch_version),
        },
    }


def own_version() -> str:
    """The version of this package; "unknown" for a copy that was not installed."""
    try:
        return version("empathic")
    except PackageNotFoundError:
        return "unknown"


def version_text(runs: list[dict]) -> str:
    """The versions of the packages that the last run used; those of the present ones if there is no run."""
    found = runs[-1]["versions"] if runs else {"empathic": own_version(), "transformers": transformers_version}
    return ", ".join(f"{name} {number}" for name, number in found.items())


def quality(metrics: dict) -> dict[str, float]:
    """Select the metrics of a trainer that measure the model's quality, without times, speeds and counts."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(("train_loss", "eval_")) and not NO_METRIC.fullmatch(name)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


# ----------------------------------------------------------------------------------------------------------- the card


def is_ours(text: str) -> bool:
    """Whether a card is unchanged since this module wrote it; also True for PEFT's empty template."""
    mark = MARK_LINE.search(text)
    return EMPTY_CARD in text or (mark is not None and mark[1] == _digest(text[: mark.start()]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def kept_card(folder: str | os.PathLike):
    """Restore the folder's card after the block: PEFT overwrites it with its own card."""
    path = Path(folder, CARD)
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None:
        path.write_bytes(before)
    else:
        path.unlink(missing_ok=True)


def write_card(folder: str | os.PathLike) -> None:
    """Write the card of a model or stage folder from its record, unless the card was changed by hand."""
    path = Path(folder, CARD)
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8")):
        return
    path.write_text(folder_card(folder), encoding="utf-8")


def folder_card(folder: str | os.PathLike, model_id: str = HERE, base: str | None = None) -> str:
    """
    Build the card of a folder.

    Args:
        model_id: the model's name in the card.
        base: the Hub id of the base of a stage whose stage file names a folder as its base.
    """
    kind = "model"
    if Path(folder, STAGE_FILE).is_file():
        kind = "adapter" if Path(folder, ADAPTER_CONFIG).is_file() else "stage"
        if base is None:
            base = json.loads(Path(folder, STAGE_FILE).read_text(encoding="utf-8"))["base"]
            base = hub_id(base) if isinstance(base, str) and not Path(folder, base).is_dir() else None
    record = read_record(str(folder))
    return model_card(record["runs"], model_id, kind=kind, base=base, results=record.get("results"))


def model_card(
    runs: list[dict], model_id: str, *, kind: str = "model", base: str | None = None, results: dict | None = None
) -> str:
    """
    Build a model card with its metadata.

    Args:
        runs: the runs of the stages, in order.
        model_id: the Hub id, or the path that the snippet loads.
        kind: `model` (whole), `stage` (trained parts without their base) or `adapter`.
        base: the Hub id of the base of a `stage` or `adapter`.
        results: results of the held-out evaluation, as in quickstart's results.json.
    """
    parts = next((run["parts"] for run in runs if run["parts"]), {})
    bases = [name for name in (base, *(run["start"] for run in reversed(runs)), *parts.values()) if name]
    ids = [data["id"] for run in runs for data in run["data"] if data["id"]]
    found = evaluations(runs, results)
    data = ModelCardData(
        language="en",
        license="other",
        license_name="terms-of-base-models-and-data",
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=["empathic", "dialogue", "emotion", "audio", "video", "memory", *(["lora"] if kind == "adapter" else [])],
        base_model=list(dict.fromkeys(bases)) or None,
        base_model_relation=None if not bases else "adapter" if kind == "adapter" else "finetune",
        datasets=sorted(set(ids)) or None,
        model_name="empathic" if model_id == HERE else model_id.rpartition("/")[2],
        eval_results=found or None,
    )
    text = f"---\n{data.to_yaml().rstrip()}\n---\n\n{_text(runs, model_id, kind, base, parts, found)}"
    return f"{text}{MARK.format(digest=_digest(text))}\n"


def evaluations(runs: list[dict], results: dict | None) -> list[EvalResult]:
    """Return the metrics of the runs, and the results of the held-out evaluation."""
    found = []

    def add(data: list[dict], split: str, kind: str, name: str, value: float) -> None:
        names = [entry["name"] for entry in data] or ["unknown"]
        slug = re.sub(r"[^\w.-]+", "-", " ".join(names)).strip("-").lower()
        found.append(
            EvalResult(
                task_type="any-to-any",
                dataset_type=data[0]["id"] if len(data) == 1 and data[0]["id"] else slug,
                dataset_name=", ".join(names),
                dataset_split=split,
                metric_type=kind,
                metric_name=name,
                metric_value=value,
            )
        )

    for run in runs:
        for name, value in run["metrics"].items():
            split = run["eval_split"] if name.startswith("eval_") else "train"
            kind = name.removeprefix("eval_").removeprefix("train_")
            kind = "accuracy" if kind.endswith("accuracies") else kind
            add(run["data"], split or "validation", kind, f"{name}, stage {run['stage']}", value)
    results, data = results or {}, runs[0]["data"] if runs else []
    for name, value in results.get("emotion", {}).items():
        add(data, "test", "accuracy", f"emotion from {'+'.join(name)}", value)
    for number, row in results.get("reconstruction", {}).items():
        for name, value in row.items():
            add(data, "test", name, f"{name}, {number} utterances rebuilt", value)
    for name, value in results.get("dialogue", {}).get("epo", {}).items():
        add(data, "test", name, f"{name} of replies", value)
    return found


def _plain(value) -> str:
    """Escape text for a cell of a Markdown table."""
    return re.sub(r"([|<>`*\[\]])", r"\\\1", " ".join(str(value).split()))


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _text(runs: list[dict], model_id: str, kind: str, base: str | None, parts: dict, found: list[EvalResult]) -> str:
    whole = {
        "model": "This is a whole model.",
        "stage": "This repository contains the parts that its last stage trained; loading it also loads the base",
        "adapter": "This repository contains a LoRA adapter of the language model; loading it also loads the base",
    }[kind]
    if kind != "model":
        whole += f" [{base}](https://huggingface.co/{base})." if base else " that `empathic_stage.json` names."
    sections = [
        f"# {model_id.rpartition('/')[2] if model_id != HERE else 'An empathetic audio-visual chatbot'}",
        "A chatbot that takes the user's text, voice and face as input, remembers each utterance of a conversation as "
        "a memory vector (or a few), and answers in text. Q-formers read the outputs of CLIP and Whisper, a Mamba "
        f"model compresses the history, and a causal language model writes the reply. {whole}",
        f"An open implementation of the paper *{TITLE}* (Kim, Park, Ro; KAIST), with the `empathic` package. It is not "
        f"the code or model of the authors. This card was written by version {own_version()} of the package.",
        "## Use",
        _snippet(model_id),
        "Leave out `audio`, `video` or both if you have none. Earlier messages in the list are the history. The "
        "code is part of the repository, so this needs only `transformers`, `torch`, `av` and `pillow`"
        + (", and `peft`." if kind == "adapter" else "."),
        "## Training",
        _training(runs, parts),
        "## Results",
        _table(["data", "split", "metric", "value"], [_result_row(result) for result in found])
        if found
        else "No metrics were recorded.",
        "Losses of the stages before `epo` are means over target tokens. `train_loss` is the loss on training data.",
        "## Limits",
        "- It knows seven emotions (angry, disgust, fearful, happy, neutral, sad, surprise), as labeled in training "
        "data, and is less accurate for faces and voices that differ from that data.\n"
        "- The emotion that it recognizes may be wrong. Do not use it to judge people or as help in a crisis.\n"
        "- Its replies can be untrue, biased or hurtful, like those of its language model. English only.\n"
        "- The memory is lossy: names and numbers from long conversations may be lost or mixed up.",
        "## License",
        "The code is under Apache-2.0. The weights are subject to the licenses of the models they are based on and to "
        "the terms of the training data; check these before you use or share the weights.",
        _terms(runs, parts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n\n"


def _snippet(model_id: str) -> str:
    return f"""```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

name = "{model_id}"
model = AutoModelForMultimodalLM.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

clip = "clip.mp4"  # a video of the speaker
turn = [
    {{"type": "audio", "path": clip}},
    {{"type": "video", "path": clip}},
    {{"type": "text", "text": "I failed the exam."}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": "Hello!"}}, {{"role": "user", "content": turn}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(output, skip_special_tokens=True))
```"""


def _result_row(result: EvalResult) -> list:
    return [result.dataset_name, result.dataset_split, result.metric_name, _number(result.metric_value)]


def _training(runs: list[dict], parts: dict) -> str:
    if not runs:
        return "There is no record of how these weights were trained."
    lines = []
    if parts:
        names = ", ".join(f"{name} {value or '(a local model)'}" for name, value in parts.items())
        lines.append(f"Composed of four pretrained parts: {_plain(names)}. Then trained in stages:")
    else:
        start = runs[0]["start"]
        lines.append(f"Trained in stages, starting from {start or 'a local model'}:" if start else "Trained in stages:")
    header = ["stage", "data", "steps", "samples per step", "learning rate", "trained", "precision", "run as"]
    rows = [
        [
            run["stage"],
            ", ".join(data["name"] for data in run["data"]),
            f"{run['steps']:,}",
            run["samples_per_step"],
            f"{run['learning_rate']:g}",
            f"{run['trained_parameters']:,}",
            run["precision"],
            f"{run.get('strategy', 'data parallel')}, {run['processes']} process{'es' * (run['processes'] > 1)}",
        ]
        for run in runs
    ]
    lines += [_table(header, rows)]
    details = []
    for run in runs:
        settings = ", ".join(f"`{name}` {value}" for name, value in run["settings"].items())
        details.append(f"- `{run['stage']}`: {STAGE_TEXTS[run['stage']]}. `seed` {run['seed']}, {settings}.")
    return "\n\n".join([*lines, "\n".join(details), f"Last stage with {version_text(runs)}."])


def _terms(runs: list[dict], parts: dict) -> str:
    lines = [f"- `{name}`: the license of this model" for name in dict.fromkeys(filter(None, parts.values()))]
    seen = {data["name"]: data for run in runs for data in run["data"]}
    for name, data in seen.items():
        terms = " ".join(filter(None, [data["license"] and f"`{data['license']}`.", data["terms"]]))
        lines.append(f"- {_plain(name)}: {terms or 'the terms of this data set are not recorded.'}")
    return "\n".join(lines)

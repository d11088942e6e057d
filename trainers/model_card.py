"""The record of the runs that made a model, which goes from stage to stage, and the model card written from it."""

import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import DatasetCard, EvalResult, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from peft import __version__ as peft_version
from torch import __version__ as torch_version
from transformers import __version__ as transformers_version

from empathic.composition_empathic import ADAPTER_CONFIG, STAGE_FILE, find_file
from empathic.hub import CARD

RUNS_FILE = "empathic_runs.json"  # {"runs": [the first stage's, ..., the last one's], "results": of `quickstart`}
HERE = "path/of/this/folder"  # what a card that is not on the Hub calls its model
EMPTY_CARD = "# Model Card for Model ID"  # the form that PEFT leaves beside an adapter: it says nothing yet
# The last line of a card: with it, a card that somebody has changed since is told from one that nobody has.
MARK = "<!-- Written by `empathic` ({digest}). A card that was changed by hand is left as it is. -->"
MARK_LINE = re.compile(re.escape(MARK).replace(re.escape("{digest}"), "([0-9a-f]{16})") + r"\n\Z")

TITLE = "Empathetic Response in Audio-Visual Conversations Using Emotion Preference Optimization and MambaCompressor"
STAGE_TEXTS = {
    "emotion": "the Q-formers, their queries and projectors learn to name the emotion of a clip",
    "memory_single": "the MambaCompressor learns to hold an utterance in one vector",
    "memory_multi": "the MambaCompressor learns to hold conversations at one vector an utterance",
    "dialogue": "a LoRA adapter of the language model learns to reply to what it hears, sees and remembers",
    "epo": "the adapter learns to prefer replies of the right feeling (Emotional Preference Optimization)",
}
# What the card says of a run beside the columns of its table, where the run has it.
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
    """The name, if it is an id on the Hub and not a folder of this machine."""
    is_id = name is not None and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) and not Path(name).exists()
    return name if is_id else None


def read_record(path: str, **hub) -> dict:
    """`runs` (none for a model that was not trained here) and `results` of a folder or Hub repository."""
    file = find_file(str(path), RUNS_FILE, **hub)
    return {"runs": []} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def write_record(folder: str | os.PathLike, record: dict) -> None:
    """Writes what `read_record` reads."""
    Path(folder, RUNS_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def data_facts(name: str) -> dict:
    """`name`, `id` (None for a folder), `license` and `terms` of a data set, as far as its card tells them."""
    facts = {"name": hub_id(name) or Path(name).resolve().name, "id": hub_id(name), "license": None, "terms": None}
    path = Path(name, CARD)
    if facts["id"] is None and not path.is_file():
        return facts
    try:
        card = DatasetCard.load(path if facts["id"] is None else name, ignore_metadata_errors=True)
    except (HfHubHTTPError, OSError, ValueError):  # no card, or none that can be had now: the run goes on without
        return facts
    heading = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    title = card.data.pretty_name or (heading[1] if heading else None)
    if facts["id"] is None and title:
        facts["name"] = title
    terms = card.text.partition("## Licence\n")[2].strip().split("\n\n")[0]
    return facts | {"license": card.data.license, "terms": " ".join(terms.split()) or None}


def new_run(script, args, model_args, start: str | dict, num_trained: int) -> dict:
    """
    What is known of a stage's run when it starts. Folders of this machine are not named.

    Args:
        script, args, model_args: as `trainers.train` parses them.
        start: the folder or Hub id that the stage starts from, or the four parts.
        num_trained: parameters that train.
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
        "parts": {k: hub_id(v) for k, v in start.items() if isinstance(v, str)} if isinstance(start, dict) else None,
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
        "versions": {"transformers": transformers_version, "peft": peft_version, "torch": str(torch_version)},
    }


def quality(metrics: dict) -> dict[str, float]:
    """Of a trainer's metrics those that say how good the model is: no times, speeds and counts."""
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(("train_loss", "eval_")) and not NO_METRIC.fullmatch(name)
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


# ----------------------------------------------------------------------------------------------------------- the card


def is_ours(text: str) -> bool:
    """Whether a card stands as it was written here; also of PEFT's empty form."""
    mark = MARK_LINE.search(text)
    return EMPTY_CARD in text or (mark is not None and mark[1] == _digest(text[: mark.start()]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def kept_card(folder: str | os.PathLike):
    """Whatever is written within, the folder's card is as it was: PEFT writes its own over it."""
    path = Path(folder, CARD)
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None:
        path.write_bytes(before)
    else:
        path.unlink(missing_ok=True)


def write_card(folder: str | os.PathLike) -> None:
    """Writes the card of a model's or a stage's folder from its record, unless somebody has changed it by hand."""
    path = Path(folder, CARD)
    if path.is_file() and not is_ours(path.read_text(encoding="utf-8")):
        return
    path.write_text(folder_card(folder), encoding="utf-8")


def folder_card(folder: str | os.PathLike, model_id: str = HERE, base: str | None = None) -> str:
    """
    The card of a folder.

    Args:
        model_id: what the model is called where the card will stand.
        base: of a stage that stands on a folder: that base's id on the Hub.
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
    A model card with its metadata.

    Args:
        runs: the record of the stages, the first one first.
        model_id: the id on the Hub, or what else the snippet loads.
        kind: `model` (whole), `stage` (trained parts beside a base) or `adapter`.
        base: of the last two, the base's id on the Hub.
        results: of the held-out evaluation, as in quickstart's results.json.
    """
    parts = next((run["parts"] for run in runs if run["parts"]), {})
    bases = [name for name in (base, *(run["start"] for run in reversed(runs)), *parts.values()) if name]
    ids = [data["id"] for run in runs for data in run["data"] if data["id"]]
    evaluations = _evaluations(runs, results)
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
        eval_results=evaluations or None,
    )
    text = f"---\n{data.to_yaml().rstrip()}\n---\n\n{_text(runs, model_id, kind, base, parts, evaluations)}"
    return f"{text}{MARK.format(digest=_digest(text))}\n"


def _evaluations(runs: list[dict], results: dict | None) -> list[EvalResult]:
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
    """Text that means nothing to Markdown in a cell of a table."""
    return re.sub(r"([|<>`*\[\]])", r"\\\1", " ".join(str(value).split()))


def _table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _text(runs: list[dict], model_id: str, kind: str, base: str | None, parts: dict, found: list[EvalResult]) -> str:
    whole = {
        "model": "This is a whole model.",
        "stage": "This repository holds the parts that its last stage trained; loading it also loads the base",
        "adapter": "This repository holds a LoRA adapter of the language model; loading it also loads the base",
    }[kind]
    if kind != "model":
        whole += f" [{base}](https://huggingface.co/{base})." if base else " that `empathic_stage.json` names."
    sections = [
        f"# {model_id.rpartition('/')[2] if model_id != HERE else 'An empathetic audio-visual chatbot'}",
        "A chatbot that hears how a thing is said, sees the face that says it, remembers a conversation at one vector "
        "an utterance, and answers in text. CLIP and Whisper are seen through Q-formers, a Mamba compresses the "
        f"history, and a causal language model answers. {whole}",
        f"An open implementation of the paper *{TITLE}* (Kim, Park, Ro; KAIST), with the `empathic` package. It is not "
        "the authors' own code or model.",
        "## Use",
        _snippet(model_id),
        "Leave out `audio`, `video` or both where there are none. Earlier messages in the list are the history. The "
        "code comes with the model, so this needs `transformers`, `torch`, `av` and `pillow`"
        + (", and `peft`." if kind == "adapter" else "."),
        "## Training",
        _training(runs, parts),
        "## Results",
        _table(["data", "split", "metric", "value"], [_result_row(result) for result in found])
        if found
        else "No metrics were recorded.",
        "Losses of the stages before `epo` are means over target tokens. `train_loss` is of what the stage trained on.",
        "## Limits",
        "- It reads emotions as one of seven (angry, disgust, fearful, happy, neutral, sad, surprise), as its corpora "
        "label them; faces and voices unlike theirs are read worse.\n"
        "- What it takes for a feeling may be wrong. It is no means to judge people, and no help in a crisis.\n"
        "- Its replies can be untrue, biased or hurtful, as those of its language model. English only.\n"
        "- The memory is lossy: names and numbers of long conversations may be lost or mixed up.",
        "## Licence",
        "The code is under Apache-2.0. The weights follow the licences of the models that they were made from, and the "
        "terms of the data that they were trained on; mind them before you use or share the weights.",
        _terms(runs, parts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n\n"


def _snippet(model_id: str) -> str:
    return f"""```python
from transformers import AutoModelForMultimodalLM, AutoProcessor

name = "{model_id}"
model = AutoModelForMultimodalLM.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)

clip = "clip.mp4"  # a film of the one who speaks
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
        lines.append(f"Composed of four pretrained parts: {_plain(names)}. Then trained in stages, one on the other:")
    else:
        start = runs[0]["start"]
        lines.append(f"Trained in stages, from {start or 'a local model'}:" if start else "Trained in stages:")
    header = ["stage", "data", "steps", "samples a step", "learning rate", "trained", "precision", "run as"]
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
    versions = ", ".join(f"{name} {number}" for name, number in runs[-1]["versions"].items())
    return "\n\n".join([*lines, "\n".join(details), f"Last stage with {versions}."])


def _terms(runs: list[dict], parts: dict) -> str:
    lines = [f"- `{name}`: the licence of that model" for name in dict.fromkeys(filter(None, parts.values()))]
    seen = {data["name"]: data for run in runs for data in run["data"]}
    for name, data in seen.items():
        terms = " ".join(filter(None, [data["license"] and f"`{data['license']}`.", data["terms"]]))
        lines.append(f"- {_plain(name)}: {terms or 'the terms of this data set are not recorded.'}")
    return "\n".join(lines)

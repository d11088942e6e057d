"""
Score the replies of several systems to held-out conversations (paper's Table 1), and the ablation (Table 2).

    empathic evaluate dialogue ours=empathic:runs/epo base=empathic:runs/dialogue --data data/meld --output runs/tables
    empathic evaluate ablation text=runs/dialogue_ft memory=runs/dialogue_mc epo=runs/epo --data data/iemocap \\
        --output runs/tables

OUT/dialogue.json holds the table, OUT/dialogue/NAME.jsonl the replies of each system, and OUT/dialogue/clips the clips
if the data set stores them as bytes; likewise for the ablation. With several data sets, each has its own folder in OUT.
"""

import argparse
import gc
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..data_prep.loading import load_prepared
from ..data_prep.views import DialogueSamples
from .published import SOURCE, TABLE_1, TABLE_2
from .replies import read_replies, write_replies
from .reply_options import CLIPS
from .results import held_table, versions, write_results
from .scores import METRICS, Scoring, score_replies
from .statistics_of_replies import ADJUSTED
from .systems.open import SYSTEM_KINDS, open_system, read_spec
from .tables import reply_warnings, table, with_interval

PATIENCE = timedelta(days=30)  # timeout of the process group: processes wait for the slowest process
SIGNIFICANT = 0.05

# Rows of Table 2 in the paper's order: finetuned, MambaCompressor, audio-visual emotion extractor, EPO.
ABLATION = {
    "base": (False, False, False, False),
    "text": (True, False, False, False),
    "memory": (True, True, False, False),
    "memory_av": (True, True, True, False),
    "epo": (True, True, True, True),
}
# The inputs of each row, as in its training recipe: dialogue_ft, dialogue_mc, dialogue_mc_av, epo.
SEEN = {
    "text": "history=text,media=false",
    "memory": "history=memory,media=false",
    "memory_av": "history=memory,media=true",
    "epo": "history=memory,media=true",
}


@contextmanager
def open_process(device: str | None) -> Iterator[tuple[PartialState, str]]:
    """Join the processes of `accelerate launch`, if any; give the state of this process and its device."""
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    try:
        yield state, str(state.device) if device in (None, "cpu") or state.num_processes > 1 else device
    finally:
        if state.num_processes > 1:
            state.destroy_process_group()


def ablation_specs(given: Sequence[str]) -> list[str]:
    """
    Return the rows of the ablation as system specs, in the paper's order.

    Args:
        given: `ROW=PATH`, with a row of `ABLATION`; `ROW=PATH,option=value` if the model was not trained by the recipe
            of its row; `ROW=KIND:TARGET` for another system, such as the model without finetuning.

    Raises:
        ValueError: if a row is unknown or given twice, or there are no rows.
    """
    specs = {}
    for text in given:
        row, _, rest = text.partition("=")
        if row not in ABLATION or not rest:
            raise ValueError(f"{text} is not a row of the ablation. Write ROW=PATH, ROW one of {', '.join(ABLATION)}.")
        if row in specs:
            raise ValueError(f"{text}: the row {row} is given twice; give each row once.")
        if rest.partition(":")[0] in SYSTEM_KINDS:
            specs[row] = text
        elif row not in SEEN:
            raise ValueError(
                f"{text}: this row needs a kind. Write {row}=KIND:TARGET; the kinds are {', '.join(SYSTEM_KINDS)}."
            )
        else:
            path, *options = rest.split(",")
            specs[row] = ",".join([f"{row}=empathic:{path}", SEEN[row], *options])
    if not specs:
        raise ValueError(f"Name the rows of the ablation as ROW=PATH; the rows are {', '.join(ABLATION)}.")
    return [specs[row] for row in ABLATION if row in specs]


def evaluate_systems(
    specs: Sequence[str],
    data: Sequence[str],
    output: str | Path,
    scoring: Scoring,
    *,
    kind: str = "dialogue",
    split: str = "test",
    max_samples: int | None = None,
    reply_speakers: Sequence[str] | None = None,
    baseline: str | None = None,
    clips: int = CLIPS,
    references: str | Path | None = None,
    seed: int = 0,
    accelerator=None,
    progress: bool = True,
    **common,
) -> dict[str, dict]:
    """
    Generate replies of all systems to held-out samples, score them, and write all results (see the module).

    Replies saved by an earlier run with the same settings are reused.

    Args:
        specs: system specs, see `open_system`.
        data: prepared data sets, folders or Hub ids.
        output: output folder.
        scoring: the metrics and their options.
        kind: `dialogue` compares every system with the baseline; `ablation` also compares each row with the row before.
        split: split of the data sets.
        max_samples: use only the first `max_samples` samples of each data set.
        reply_speakers: speakers whose replies are predicted, such as a corpus's assistant; all by default.
        baseline: name of the system that the others are compared with; the first by default.
        clips: number of samples whose clips are saved, see `write_replies`.
        references: file of further acceptable replies for EmotionScore, see `read_references`.
        seed: sampling seed.
        accelerator: state of `accelerate launch`, see `write_replies`.
        progress: whether to show progress bars.
        common: arguments of `evaluation.systems.base.Common`.

    Returns:
        The results of each data set, as in its JSON file; empty on all but the main process.

    Raises:
        ValueError: if a spec, the baseline or a data set is invalid.
    """
    names = [read_spec(spec)[0] for spec in specs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Two systems have the name {twice[0]}. Write NAME=KIND:TARGET with different names.")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"The baseline {baseline!r} is not one of the systems {', '.join(names)}.")
    folders = data_folders(data, Path(output))
    samples = {name: dialogue_samples_of(name, split, reply_speakers, max_samples) for name in data}
    files: dict[str, dict[str, Path]] = {name: {} for name in data}
    further = {} if references is None else read_references(references)
    systems = {name: open_system(spec, **common) for name, spec in zip(names, specs, strict=True)}
    settings = {name: system.settings for name, system in systems.items()}  # fail before any reply is generated
    for name in names:
        system = systems.pop(name)
        for data_set, folder in folders.items():
            files[data_set][name] = write_replies(
                system,
                samples[data_set],
                folder / kind,
                seed=seed,
                clips=clips,
                accelerator=accelerator,
                progress=progress,
            )
        del system  # free its memory before the next system is loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if accelerator is not None and not accelerator.is_main_process:
        return {}
    pairs = [(name, baseline) for name in names if name != baseline]
    if kind == "ablation":
        pairs += [pair for pair in zip(names[1:], names, strict=False) if pair not in pairs]
    results = {}
    for data_set, folder in folders.items():
        replies = {name: read_replies(file) for name, file in files[data_set].items()}
        labels = _reply_emotions(samples[data_set])
        for rows in replies.values():
            for row, label in zip(rows, labels, strict=True):
                row |= {"reply_emotion": label, "references": further.get(row["id"], ())}
        found = score_replies(replies, scoring, pairs)
        for name, system in found["systems"].items():
            file = files[data_set][name].relative_to(folder).as_posix()
            system |= {"settings": settings[name], "replies": file}
        corpora = Counter(row["id"].partition("/")[0] for row in replies[names[0]])
        results[data_set] = {
            "table": kind,
            **found,
            "baseline": baseline,
            "settings": {
                "data": data_set,
                "corpora": dict(corpora),
                "split": split,
                "max_samples": max_samples,
                "reply_speakers": None if reply_speakers is None else list(reply_speakers),
                "references": None if references is None else str(references),
                "seed": seed,
                "confidence": scoring.confidence,
                "resamples": scoring.resamples,
                "interval": "bootstrap over conversations (BCa)",
                "test": f"paired permutation test over conversations, two-sided, {ADJUSTED}",
            },
            "versions": versions(),
            "published": {
                "source": SOURCE,
                "rows": {"iemocap": TABLE_2}
                if kind == "ablation"
                else {corpus: rows for corpus, rows in TABLE_1.items() if corpus in corpora},
            },
        }
        write_results(folder / f"{kind}.json", results[data_set])
    return results


def dialogue_samples_of(
    data: str, split: str, reply_speakers: Sequence[str] | None, max_samples: int | None
) -> DialogueSamples:
    """Load the samples of a split; raise ValueError, with the name of the data set, if there are none."""
    rows = load_prepared(data, split)
    samples = DialogueSamples(rows, reply_speakers)
    if max_samples is not None:
        samples.places = samples.places[:max_samples]
    if not len(samples):
        raise ValueError(f"{data}: its split {split} has no turn that answers another speaker; choose another split.")
    return samples


def _reply_emotions(samples: DialogueSamples) -> list[str | None]:
    """The emotion of each sample's true reply, where it is labeled."""
    emotions = samples.texts["emotion"][:]
    return [emotions[row] for row in samples.places[:, 1].tolist()]


def read_references(path: str | Path) -> dict[str, list[str]]:
    """
    Read further acceptable replies: JSONL with `id`, the id of a saved reply, and `references`, a list of texts.

    Raises:
        ValueError: if the file cannot be read, or a line is not of this form; the message has its number.
    """
    found: dict[str, list[str]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Give a JSONL file of references.") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, texts = row["id"], row["references"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}:{number}: is not {{"id": ..., "references": [...]}}.') from None
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}:{number}: references are {texts!r:.80}; give a list of texts that are not empty.")
        found.setdefault(str(name), []).extend(texts)
    return found


def data_folders(data: Sequence[str], output: Path) -> dict[str, Path]:
    """The output folder of each data set: OUT itself if there is only one data set."""
    if len(data) == 1:
        return {data[0]: output}
    folders = {name: output / Path(name).name for name in data}
    if len(set(folders.values())) < len(data):
        raise ValueError(f"The data sets {', '.join(data)} need different names: each has its own folder in {output}.")
    return folders


# -------------------------------------------------------------------------------------------------------------- shown


def show(results: dict) -> str:
    """Format the table as text: our rows, then the published rows of the paper."""
    ablation = results["table"] == "ablation"
    metrics = list(next(iter(results["systems"].values()))["metrics"])
    baseline = results["baseline"]
    significant = {
        (found["a"], found["metric"])
        for found in results["comparisons"]
        if found["b"] == baseline and found["p_holm"] < SIGNIFICANT
    }
    rows = []
    for name, system in results["systems"].items():
        cells = [
            with_interval(values, " *" if (name, metric) in significant else "")
            for metric, values in system["metrics"].items()
        ]
        rows.append([*_head(name, ablation), system["count"], *cells])
    for corpus, published in results["published"]["rows"].items():
        for name, values in published.items():
            cells = [f"{values[metric]:.3f}" if metric in values else "" for metric in metrics]
            rows.append([*_head(name, ablation, f" (published, {corpus})"), "", *cells])
    header = ["system", *(["FT", "MC", "AV", "EPO"] if ablation else []), "replies", *(METRICS[m] for m in metrics)]
    settings = results["settings"]
    lines = [
        f"{settings['data']}, split {settings['split']}",
        table(header, rows),
        f"[{settings['confidence']:.0%} interval]: {settings['interval']}.",
        f"*: differs from {baseline}, p < {SIGNIFICANT}; {settings['test']}.",
    ]
    lines += [f"{METRICS[metric]}: {by}." for metric, by in results["computed_by"].items()]
    lines += [f"{METRICS[metric]} is left out: {reason}." for metric, reason in results["skipped"].items()]
    if results["published"]["rows"]:
        lines.append(f"Published rows: {results['published']['source']}.")
    else:
        lines.append(f"The paper has no row for {', '.join(settings['corpora'])}; it has {', '.join(TABLE_1)}.")
    for name, system in results["systems"].items():
        shown = system.get("settings", {})
        for option, value in shown.get("trained_with", {}).items():
            if shown[option] != value:
                lines.append(
                    f"WARNING: {name} was trained with {option} {value} but evaluated with {option} {shown[option]}."
                )
        lines += reply_warnings(name, system, "they score 0")
    if results["left_out"]:
        found = results["left_out"][0]
        lines.append(
            f"WARNING: {len(results['left_out'])} samples are left out, such as {found['id']}: {found['reason']}."
        )
    return "\n".join(lines)


def _head(name: str, ablation: bool, published: str = "") -> list[str]:
    marks = ["x" if on else "-" for on in ABLATION[name]] if ablation else []
    return [f"{name}{published}", *marks]


# ------------------------------------------------------------------------------------------------------------ command


def run(options: argparse.Namespace, kind: str) -> int:
    """Run `empathic evaluate dialogue` or `ablation` in each process; return the exit status."""
    specs = ablation_specs(options.systems) if kind == "ablation" else options.systems
    with open_process(options.device) as (state, device), held_table(options.output, kind, state):
        scoring = Scoring(
            metrics=options.metrics,
            classifier=options.classifier,
            pooling=options.pooling,
            bertscore_model=options.bertscore_model,
            bertscore_layer=options.bertscore_layer,
            confidence=options.confidence,
            resamples=options.resamples,
            seed=options.seed,
            device=device,
        )
        results = evaluate_systems(
            specs,
            options.data,
            options.output,
            scoring,
            kind=kind,
            split=options.split,
            max_samples=options.max_samples,
            reply_speakers=options.reply_speakers,
            baseline=options.baseline,
            clips=options.clips,
            references=options.references,
            seed=options.seed,
            accelerator=state,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            device=device,
            dtype=options.dtype,
        )
    for found in results.values():
        print(show(found))
    if results:
        print(f"Results are in {options.output}.")
    return 0

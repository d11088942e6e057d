"""
The replies of several systems to held-out conversations, scored (paper's Table 1), and the ablation (Table 2).

    empathic evaluate dialogue ours=empathic:runs/epo base=empathic:runs/dialogue --data data/meld --output runs/tables
    empathic evaluate ablation text=runs/dialogue_ft memory=runs/dialogue_mc epo=runs/epo --data data/iemocap \\
        --output runs/tables

OUT/dialogue.json holds the table, OUT/dialogue/NAME.jsonl each system's replies, OUT/dialogue/clips what they answered
where the data set holds its clips inside itself; likewise for the ablation. With several data sets each has a folder of
its own in OUT.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import load_dataset

from empathic.data_prep.views import DialogueSamples
from empathic.evaluation.published import SOURCE, TABLE_1, TABLE_2
from empathic.evaluation.replies import read_replies, write_replies
from empathic.evaluation.reply_options import CLIPS
from empathic.evaluation.results import versions, write_results
from empathic.evaluation.scores import METRICS, Scoring, score_replies
from empathic.evaluation.statistics_of_replies import ADJUSTED
from empathic.evaluation.systems import KINDS, open_system, read_spec
from empathic.evaluation.tables import table, with_interval

PATIENCE = timedelta(days=30)  # a process waits so long for the slowest one
SIGNIFICANT = 0.05

# Rows of Table 2 in the paper's order: finetuned, MambaCompressor, audio-visual emotion extractor, EPO.
ABLATION = {
    "base": (False, False, False, False),
    "text": (True, False, False, False),
    "memory": (True, True, False, False),
    "memory_av": (True, True, True, False),
    "epo": (True, True, True, True),
}
# What each row gets to see, as its recipe trained it: dialogue_ft, dialogue_mc, dialogue_mc_av, epo.
SEEN = {
    "text": "history=text,media=false",
    "memory": "history=memory,media=false",
    "memory_av": "history=memory,media=true",
    "epo": "history=memory,media=true",
}


def open_process(device: str | None) -> tuple[PartialState, str]:
    """This process among those of `accelerate launch`, or alone; and its device."""
    state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
    return state, str(state.device) if device in (None, "cpu") or state.num_processes > 1 else device


def close_process(state: PartialState) -> None:
    """Leaves the group of processes, where there is one."""
    if state.num_processes > 1:
        state.destroy_process_group()


def ablation_specs(given: Sequence[str]) -> list[str]:
    """
    The rows of the ablation as specs of systems, in the paper's order.

    Args:
        given: `ROW=PATH`, with a row of `ABLATION`; `ROW=PATH,option=value` where a model was trained otherwise than by
            its recipe; `ROW=KIND:TARGET` for another system, such as the model that is not finetuned.

    Raises:
        ValueError: for another row, one that is given twice, or none.
    """
    specs = {}
    for text in given:
        row, _, rest = text.partition("=")
        if row not in ABLATION or not rest:
            raise ValueError(f"{text}: is no row of the ablation. Write ROW=PATH, ROW one of {', '.join(ABLATION)}.")
        if row in specs:
            raise ValueError(f"{text}: the row {row} is given twice.")
        if rest.partition(":")[0] in KINDS:
            specs[row] = text
        elif row not in SEEN:
            raise ValueError(f"{text}: name its kind, {row}=KIND:TARGET; the kinds are {', '.join(KINDS)}.")
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
    seed: int = 0,
    accelerator=None,
    progress: bool = True,
    **common,
) -> dict[str, dict]:
    """
    Lets systems reply to held-out samples, and scores the replies. All of it is written; see the module.

    Replies that an earlier run made under the same settings are taken from there.

    Args:
        specs: of `open_system`.
        data: prepared data sets, folders or Hub ids.
        output: folder to write.
        scoring: what is computed.
        kind: `dialogue`, every system beside the baseline; or `ablation`, each row also beside the one before it.
        split: of the data sets.
        max_samples: only the first so many samples of each.
        reply_speakers: whose replies, such as a corpus's assistant; everybody's by default.
        baseline: name of the system that the others are compared with; the first by default.
        clips: of how many samples, see `write_replies`.
        seed: of sampling.
        accelerator: of `accelerate launch`, see `write_replies`.
        progress: shows bars.
        common: of `evaluation.systems.Common`.

    Returns:
        the results of each data set, as in its JSON file; on all but the main process none.

    Raises:
        ValueError: for a spec, a baseline or a data set that does not fit.
    """
    names = [read_spec(spec)[0] for spec in specs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Two systems are called {twice[0]}: write NAME=KIND:TARGET with different names.")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"The baseline {baseline!r} is none of the systems {', '.join(names)}.")
    folders = _folders(data, Path(output))
    samples = {name: dialogue_samples_of(name, split, reply_speakers, max_samples) for name in data}
    files: dict[str, dict[str, Path]] = {name: {} for name in data}
    systems = {name: open_system(spec, **common) for name, spec in zip(names, specs, strict=True)}
    settings = {name: system.settings for name, system in systems.items()}  # an error of any comes before all replies
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
        del system  # before the next one is loaded
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
    """The samples of a split. ValueError, naming the data set, if there are none."""
    rows = load_dataset(data, split=split)
    missing = [name for name in ("dialogue_id", "speaker") if name not in rows.column_names]
    if missing:
        raise ValueError(f"{data}: has no column {missing[0]}; give what `empathic prepare` wrote.")
    samples = DialogueSamples(rows, reply_speakers)
    if max_samples is not None:
        samples.places = samples.places[:max_samples]
    if not len(samples):
        raise ValueError(f"{data}: in its split {split} nobody answers anybody, so there is nothing to evaluate.")
    return samples


def _folders(data: Sequence[str], output: Path) -> dict[str, Path]:
    """Where the results of each data set go: in OUT itself where there is only one."""
    if len(data) == 1:
        return {data[0]: output}
    folders = {name: output / Path(name).name for name in data}
    if len(set(folders.values())) < len(data):
        raise ValueError(f"The data sets {', '.join(data)} need different names, for each has its folder in {output}.")
    return folders


# -------------------------------------------------------------------------------------------------------------- shown


def show(results: dict) -> str:
    """The table as text: our rows, then those that the paper published."""
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
                lines.append(f"WARNING: {name} was trained with {option} {value} and shown {option} {shown[option]}.")
        if system["empty"]:
            lines.append(f"WARNING: {system['empty']} replies of {name} are empty; they score 0.")
        if system["notes"]:
            found = system["notes"][0]
            lines.append(
                f"WARNING: {len(system['notes'])} replies of {name} have a note, such as {found['id']}: {found['note']}"
            )
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
    """What `empathic evaluate dialogue` and `ablation` do on each process; returns the exit status."""
    specs = ablation_specs(options.systems) if kind == "ablation" else options.systems
    state, device = open_process(options.device)
    try:
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
            seed=options.seed,
            accelerator=state,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            device=device,
            dtype=options.dtype,
        )
    finally:
        close_process(state)
    for found in results.values():
        print(show(found))
    if results:
        print(f"All of it is in {options.output}.")
    return 0

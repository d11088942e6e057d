"""
Does the reply follow the voice and the face? Replies to the same words with clips of different emotions.

    empathic evaluate contrast ours=empathic:runs/epo deaf=empathic:runs/epo,media=false --data data/ravdess \\
        --split train+validation+test --output runs/tables

OUT/contrast.json holds the table, OUT/contrast/NAME.jsonl the replies of each system, one for each input that it can
tell apart, OUT/contrast/NAME.likelihood.jsonl the log-probabilities of given replies, and OUT/contrast/utterances.jsonl
the clips of each utterance with every system's replies and scores. A stopped run continues.
"""

import argparse
import gc
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...data_prep.clip_digests import MEDIA_KINDS
from ...data_prep.loading import load_prepared
from ...data_prep.messages import message_text
from ...files import write_text
from ..dialogue import data_folders, open_process
from ..emotion_features import GO_EMOTIONS, EmotionFeatures
from ..replies import read_replies, write_replies
from ..reply_options import CLIPS
from ..results import held_table, versions, write_results
from ..saved_clips import FOLDER, digest_of, order_of, save_clip
from ..statistics_of_replies import ADJUSTED, Draws, add_adjusted
from ..systems.open import open_system, read_spec
from ..systems.ours import EmpathicSystem
from ..tables import reply_warnings, table, with_interval
from .appropriateness import Appropriateness, read_appropriateness
from .conditions import CONDITIONS, FULL, Blanks
from .inputs import ContrastInputs
from .likelihood import LikelihoodSystem
from .scores import MEANING, METRICS, ContrastStatistics, PairScores, ReplyFits, by_emotion, pair_scores
from .utterances import SOURCES, ContrastPrompts, ContrastUtterance, find_utterances

LIKELIHOODS = ("auto", "reference", "probes", "none")
CLUSTERS = ("utterance", "speaker")
UTTERANCES = "utterances.jsonl"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ContrastOptions:
    """
    The options of the contrast evaluation.

    Args:
        split: split of the data sets; several as `train+validation`.
        pairs: how clips are paired, see `utterances.SOURCES`.
        swaps: maximum number of swapped clips of an utterance.
        max_utterances: maximum number of utterances of a data set; None for all.
        conditions: names from `CONDITIONS`; the whole clip is always among them.
        likelihood: replies of the likelihood contrast: `reference` (the true replies), `probes` (those of the table of
            appropriateness), `auto` (the true replies if there are any), or `none`.
        appropriateness: file of the table; None for the default, see `appropriateness.read_appropriateness`.
        reply_speakers: speakers whose replies are predicted; all by default.
        classifier: text emotion classifier, folder or Hub id.
        cluster: what the bootstrap draws: `utterance` or `speaker`.
        confidence, resamples, seed: options of the intervals and tests; the seed is also that of sampling.
        clips: number of utterances whose clips are saved, if the data set stores them as bytes.

    Raises:
        ValueError: if an option is out of range.
    """

    split: str = "test"
    pairs: str = "auto"
    swaps: int = 2
    max_utterances: int | None = 100
    conditions: Sequence[str] = tuple(CONDITIONS)
    likelihood: str = "auto"
    appropriateness: str | None = None
    reply_speakers: Sequence[str] | None = None
    classifier: str = GO_EMOTIONS
    cluster: str = "utterance"
    confidence: float = 0.95
    resamples: int = 10_000
    seed: int = 0
    clips: int = CLIPS

    def __post_init__(self):
        for name, value, known in (
            ("pairs", self.pairs, SOURCES),
            ("likelihood", self.likelihood, LIKELIHOODS),
            ("cluster", self.cluster, CLUSTERS),
            *(("a condition", condition, CONDITIONS) for condition in self.conditions),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(known)}.")
        if self.swaps < 1:
            raise ValueError(f"swaps is {self.swaps}; give 1 or more.")
        Draws(self.confidence, self.resamples, self.seed)

    def draws(self) -> Draws:
        """The options of the bootstrap and the tests."""
        return Draws(self.confidence, self.resamples, self.seed)

    def all_conditions(self) -> list[str]:
        """The conditions in the order of `CONDITIONS`, with the whole clip."""
        return [name for name in CONDITIONS if name == FULL or name in self.conditions]


class _DataSet:
    """A data set's utterances, the replies whose likelihood is computed, and the files of each system."""

    def __init__(self, data: str, folder: Path, options: ContrastOptions, table_of_fits: Appropriateness):
        self.data, self.folder, self.options = data, folder, options
        self.prompts = ContrastPrompts(load_prepared(data, options.split), options.reply_speakers)
        try:
            self.utterances, self.found = find_utterances(
                self.prompts, options.pairs, options.swaps, options.max_utterances
            )
        except ValueError as error:
            raise ValueError(f"{data}, split {options.split}: {error}") from None
        self.blanks = Blanks(folder / "contrast" / "blanks")
        self.likelihood, self.candidates = _candidates(self.utterances, options.likelihood, table_of_fits)
        self.inputs: dict[str, ContrastInputs] = {}
        self.scored: dict[str, ContrastInputs] = {}  # of the systems with a likelihood
        self.files: dict[str, Path] = {}

    def write(self, system, accelerator, progress: bool) -> None:
        """Write the replies and the likelihoods of a system."""
        kinds = getattr(system, "clip_kinds", MEDIA_KINDS)
        about = (self.prompts, self.utterances, self.options.all_conditions(), kinds, self.blanks)
        options = {"seed": self.options.seed, "accelerator": accelerator, "progress": progress}
        self.inputs[system.name] = ContrastInputs(*about)
        self.files[system.name] = write_replies(system, self.inputs[system.name], self.folder / "contrast", **options)
        if isinstance(system, EmpathicSystem) and self.likelihood != "none":
            texts = [[text for _, replies in those for text in replies] for those in self.candidates]
            self.scored[system.name] = ContrastInputs(*about, candidates=texts)
            write_replies(LikelihoodSystem(system), self.scored[system.name], self.folder / "contrast", **options)

    def likelihoods(self, name: str, condition: str) -> list[list[dict[str, float] | None]] | None:
        """For each clip of each utterance {emotion: log p of the replies that fit it}, a mean if there are several."""
        if name not in self.scored:
            return None
        rows = read_replies(self.files[name].with_name(f"{name}.likelihood.jsonl"))
        found = []
        for places, those in zip(self.scored[name].places[condition], self.candidates, strict=True):
            found.append([_by_emotion(rows[place].get("logps"), those) for place in places])
        return found


def _candidates(
    utterances: Sequence[ContrastUtterance], likelihood: str, fits: Appropriateness
) -> tuple[str, list[list[tuple[str, list[str]]]]]:
    """The kind of the replies whose likelihood is computed, and for each utterance (emotion, replies that fit it)."""
    true = [
        [(clip.emotion, [clip.reply]) for clip in each.clips if clip.recorded and clip.reply.strip()]
        for each in utterances
    ]
    if likelihood == "auto":
        likelihood = "reference" if any(true) else "probes"
    if likelihood == "reference":
        if not any(true):
            raise ValueError(
                "likelihood is reference, but no utterance has a true reply. Choose probes: the replies of the table."
            )
        return likelihood, true
    return likelihood, [
        [(clip.emotion, list(fits.replies[clip.emotion])) for clip in each.clips if clip.recorded]
        for each in utterances
    ]


def _by_emotion(logps: list[float] | None, candidates: list[tuple[str, list[str]]]) -> dict[str, float] | None:
    if logps is None:
        return None
    found, values = {}, iter(logps)
    for emotion, texts in candidates:
        found[emotion] = sum(next(values) for _ in texts) / len(texts)
    return found


def evaluate_contrast(
    specs: Sequence[str],
    data: Sequence[str],
    output: str | Path,
    options: ContrastOptions | None = None,
    *,
    baseline: str | None = None,
    accelerator=None,
    progress: bool = True,
    device: str | None = None,
    **common,
) -> dict[str, dict]:
    """
    Generate the replies of all systems, score them, and write all results (see the module).

    Args:
        specs: system specs, see `open_system`.
        data: prepared data sets, folders or Hub ids.
        output: output folder; with several data sets, each has its own folder in it.
        options: see `ContrastOptions`.
        baseline: name of the system that the others are compared with; the first by default.
        accelerator, progress: see `write_replies`.
        device: device of the models and of the classifier.
        common: further arguments of `evaluation.systems.base.Common`.

    Returns:
        The results of each data set, as in its JSON file; empty on all but the main process.

    Raises:
        ValueError: if a spec, the baseline, an option or a data set is invalid.
    """
    options = ContrastOptions() if options is None else options
    names = [read_spec(spec)[0] for spec in specs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"Two systems have the name {twice[0]}. Write NAME=KIND:TARGET with different names.")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"The baseline {baseline!r} is not one of the systems {', '.join(names)}.")
    try:
        features = EmotionFeatures(options.classifier, "probabilities", device)
    except OSError as error:
        raise ValueError(
            f"The classifier {options.classifier} cannot be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "Hub id with --classifier."
        ) from None
    fits = ReplyFits(features, read_appropriateness(options.appropriateness, features.labels))
    sets = [_DataSet(name, folder, options, fits.table) for name, folder in data_folders(data, Path(output)).items()]
    systems = {name: open_system(spec, device=device, **common) for name, spec in zip(names, specs, strict=True)}
    settings = {name: system.settings for name, system in systems.items()}  # fail before any reply is generated
    for name in names:
        system = systems.pop(name)
        for each in sets:
            each.write(system, accelerator, progress)
        del system  # free its memory before the next system is loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if accelerator is not None and not accelerator.is_main_process:
        return {}
    results = {}
    for each in sets:
        results[each.data] = _results(each, fits, settings, baseline)
        write_results(each.folder / "contrast.json", results[each.data])
    return results


def _results(data_set: _DataSet, fits: ReplyFits, settings: dict[str, dict], baseline: str) -> dict:
    options, utterances = data_set.options, data_set.utterances
    clusters = [
        each.name if options.cluster == "utterance" else each.speaker for each in utterances for _ in each.pairs()
    ]
    statistics = ContrastStatistics(clusters, options.draws())
    systems, scores, lines = {}, {}, [_about(data_set, each) for each in utterances]
    for name in settings:
        rows, inputs = read_replies(data_set.files[name]), data_set.inputs[name]
        scores[name] = {}
        for condition in inputs.conditions:
            replies = [[rows[place]["reply"] for place in places] for places in inputs.places[condition]]
            likelihoods = data_set.likelihoods(name, condition)
            scores[name][condition] = pair_scores(utterances, replies, fits, likelihoods)
            for number, (line, places) in enumerate(zip(lines, inputs.places[condition], strict=True)):
                line["systems"].setdefault(name, {})[condition] = [
                    {
                        "reply_id": rows[place]["id"],
                        "reply": rows[place]["reply"],
                        "fits": dict(zip(fits.emotions, map(float, fits.of([rows[place]["reply"]])[0]), strict=True)),
                        **({} if likelihoods is None else {"logps": likelihoods[number][clip]}),
                    }
                    for clip, place in enumerate(places)
                ]
        systems[name] = {
            "conditions": {condition: statistics.summary(found) for condition, found in scores[name].items()},
            "by_emotion": by_emotion(utterances, scores[name][FULL]),
            "confusion": scores[name][FULL].confusion,
            "count": len(rows),
            "empty": sum(not row["reply"].strip() for row in rows),
            "notes": [{"id": row["id"], "note": row["note"]} for row in rows if row.get("note")],
            "settings": settings[name],
            "replies": data_set.files[name].relative_to(data_set.folder).as_posix(),
        }
    _save_clips(data_set)
    write_text(
        data_set.folder / "contrast" / UTTERANCES,
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
    )
    return {
        "table": "contrast",
        "systems": systems,
        "comparisons": _between_systems(scores, statistics, baseline),
        "ablations": _between_conditions(scores, statistics),
        "baseline": baseline,
        "metrics": {name: {"title": title, "chance": chance, "meaning": MEANING[name]}
                    for name, (title, chance) in METRICS.items()},
        "conditions": {name: CONDITIONS[name][2] for name in options.all_conditions()},
        "appropriateness": {**fits.table.as_json(), "classifier": fits.features.description},
        "utterances": f"contrast/{UTTERANCES}",
        "blanks_missing": data_set.blanks.problems,
        "settings": {
            "data": data_set.data,
            "corpora": dict(Counter(each.name.partition("/")[0] for each in utterances)),
            "split": options.split,
            "pairs": data_set.found["source"],
            "labeled_clips": data_set.found["clips"],
            "utterances_found": data_set.found["utterances"],
            "utterances": len(utterances),
            "clips": sum(len(each.clips) for each in utterances),
            "clip_pairs": len(clusters),
            "left_out": data_set.found["left_out"],
            "swaps": options.swaps if data_set.found["source"] == "swap" else None,
            "max_utterances": options.max_utterances,
            "likelihood": data_set.likelihood,
            "reply_speakers": None if options.reply_speakers is None else list(options.reply_speakers),
            "cluster": options.cluster,
            "seed": options.seed,
            "confidence": options.confidence,
            "resamples": options.resamples,
            "interval": f"bootstrap over {options.cluster}s (BCa)",
            "test": f"paired permutation test over {options.cluster}s, two-sided, {ADJUSTED}",
        },
        "versions": versions(),
    }  # fmt: skip


def _between_systems(scores: dict[str, dict[str, PairScores]], statistics: ContrastStatistics, baseline: str):
    rows = []
    for name, found in scores.items():
        if name != baseline:
            rows += [
                {"a": name, "b": baseline, **row} for row in statistics.comparisons(found[FULL], scores[baseline][FULL])
            ]
    add_adjusted(rows)
    return rows


def _between_conditions(scores: dict[str, dict[str, PairScores]], statistics: ContrastStatistics) -> list[dict]:
    rows = [
        {"system": name, "condition": condition, **row}
        for name, found in scores.items()
        for condition in found
        if condition != FULL
        for row in statistics.comparisons(found[FULL], found[condition])
    ]
    add_adjusted(rows)
    return rows


def _about(data_set: _DataSet, utterance: ContrastUtterance) -> dict:
    """The line of an utterance in `utterances.jsonl`, without the systems."""
    prompt = data_set.prompts.prompt(utterance)
    clips = []
    for clip in utterance.clips:
        media = {kind: data_set.prompts.media(clip.row, kind) for kind in utterance.kinds}
        shown = {
            kind: {"digest": digest_of(item["bytes"])} if "bytes" in item else {"path": item.get("path")}
            for kind, item in media.items()
        }
        about = {"emotion": clip.emotion, "utterance_id": clip.name, "recorded": clip.recorded}
        clips.append({**about, "reference": clip.reply, "media": shown})
    messages = [{"name": each.get("name") or each["role"], "text": message_text(each)} for each in prompt]
    about = {"id": utterance.name, "speaker": utterance.speaker, "messages": messages}
    return {**about, "clips": clips, "systems": {}}


def _save_clips(data_set: _DataSet) -> None:
    """Save the clips of some utterances, if the data set stores them as bytes, for the report."""
    chosen = sorted(data_set.utterances, key=lambda each: order_of(each.name))[: data_set.options.clips]
    for utterance in chosen:
        for clip in utterance.clips:
            for kind in utterance.kinds:
                item = data_set.prompts.media(clip.row, kind)
                if item.get("bytes") is not None:
                    save_clip(item["bytes"], item.get("path"), data_set.folder / "contrast" / FOLDER)


# -------------------------------------------------------------------------------------------------------------- shown


def show(results: dict) -> str:
    """Format the tables as text."""
    settings, baseline = results["settings"], results["baseline"]
    names = [name for name in METRICS if any(name in each["conditions"][FULL] for each in results["systems"].values())]
    significant = {(row["a"], row["metric"]) for row in results["comparisons"] if row["p_holm"] < SIGNIFICANT}
    rows, others = [], []
    for name, system in results["systems"].items():
        for condition, found in system["conditions"].items():
            marks = {each: " *" if condition == FULL and (name, each) in significant else "" for each in names}
            cells = [with_interval(found[each], marks[each]) if each in found else "" for each in names]
            (rows if condition == FULL else others).append(
                [name, *([results["conditions"][condition]] if condition != FULL else []), *cells]
            )
    titles = [METRICS[name][0] for name in names]
    chance = ["chance", *("" if METRICS[name][1] is None else f"{METRICS[name][1]:.3f}" for name in names)]
    lines = [
        f"{settings['data']}, split {settings['split']}: {settings['utterances']} utterances, {settings['clips']} "
        f"clips, {settings['clip_pairs']} pairs of clips ({pair_source(settings)})",
        table(["system", *titles], [*rows, chance]),
        f"[{settings['confidence']:.0%} interval]: {settings['interval']}.",
        f"*: differs from {baseline}, p < {SIGNIFICANT}; {settings['test']}.",
        *(f"{METRICS[name][0]}: {MEANING[name]}." for name in names),
        "What fits a clip: {source}, classifier {classifier}.".format(**results["appropriateness"]),
    ]
    if settings["likelihood"] != "none":
        which = "the true replies" if settings["likelihood"] == "reference" else "the replies in the table"
        lines.append(f"Fitting replies of the likelihood contrast: {which}.")
    if others:
        lines += ["", table(["system", "given", *titles], others)]
    for reason, count in settings["left_out"].items():
        lines.append(f"{count} turns are left out: {reason}.")
    lines += warnings(results)
    return "\n".join(lines)


def pair_source(settings: Mapping) -> str:
    """How the clips of a pair belong together."""
    if settings["pairs"] == "same":
        return "the same words spoken with different emotions"
    return "clips swapped between turns of the same speaker"


def warnings(results: Mapping) -> list[str]:
    """What a reader of the table must know about empty replies and clips that could not be read."""
    lines = []
    for name, system in results["systems"].items():
        lines += reply_warnings(name, system, "they fit nothing")
    if results["blanks_missing"]:
        name, reason = next(iter(results["blanks_missing"].items()))
        lines.append(
            f"WARNING: {len(results['blanks_missing'])} utterances have no blank and get nothing in its place, such as "
            f"{name}: {reason}"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------ command


def run(options: argparse.Namespace) -> int:
    """Run `empathic evaluate contrast` in each process; return the exit status."""
    with open_process(options.device) as (state, device), held_table(options.output, "contrast", state):
        results = evaluate_contrast(
            options.systems,
            options.data,
            options.output,
            ContrastOptions(
                split=options.split,
                pairs=options.pairs,
                swaps=options.swaps,
                max_utterances=options.max_utterances or None,
                conditions=options.conditions,
                likelihood=options.likelihood,
                appropriateness=options.appropriateness,
                reply_speakers=options.reply_speakers,
                classifier=options.classifier,
                cluster=options.cluster,
                confidence=options.confidence,
                resamples=options.resamples,
                seed=options.seed,
                clips=options.clips,
            ),
            baseline=options.baseline,
            accelerator=state,
            device=device,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            dtype=options.dtype,
        )
    for found in results.values():
        print(show(found))
    if results:
        print(f"Results are in {options.output}.")
    return 0

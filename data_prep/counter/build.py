"""
Generate counter-emotional replies and make preference pairs of them (paper's Sec. 3.3 and 8; Fig. 4 and 8, Table 7).

For each sample, the LLM that will be trained answers the sentence once per emotion, as if the sentence had been said
with that emotion (`generators`). The candidate whose emotion is least similar to that of the true reply becomes the
rejected reply, if its similarity is below a threshold (`pairs`). An HTML page shows the results (`audit`).

The work is divided into chunks of samples, independent of the number of processes:

    accelerate launch -m empathic.data_prep.counter.build --model runs/dialogue --data data/meld --out data/meld-pairs

Each finished chunk is a file in OUT/.work with all candidates and their similarities under every pooling. A run that
was killed therefore resumes after its last finished chunks, and a new threshold or pooling reuses all candidates.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import cached_file, logging

from ...composition_empathic import PART_NAMES, read_stage, resolve_base
from ...configuration_empathic import EMOTIONS
from ...errors import loading, run_program
from ...evaluation.emotion_features import POOLINGS, EmotionFeatures
from ...evaluation.metrics import cosine
from ...files import fingerprint, held_folder, write_json
from ...modeling_empathic import EmpathicForConditionalGeneration
from ...processes import leave
from ...processing_empathic import EmpathicProcessor
from ...sampling import Sampling
from ..clip_digests import MEDIA_KINDS, Digests
from ..loading import load_prepared, negatives_limit
from ..messages import clip_of, message_text
from ..pipeline import STATE_FILE
from ..views import DialogueSamples
from ..writer import card_header, publish_parquet
from .audit import Audit, page
from .generators import CausalGenerator, EmpathicGenerator, VllmGenerator
from .options import add_options
from .pairs import NEAR, THRESHOLD, PairWriter, drop_reasons, make_row, misfit_reason, sample_name

logger = logging.get_logger(__name__)

WORK = ".work"  # in OUT: one folder of chunks per generation settings; done.json once OUT is complete
CHUNK = 64
PATIENCE = timedelta(days=30)  # timeout when waiting for the slowest process
# What decides a candidate besides the options. Recorded, so that candidates of earlier versions are not reused.
ALWAYS = {
    "thoughts": "left out of the reply",
    "own_generation_config": "its temperature, top_p and top_k if none are given, and no penalties",
}


def counter_pairs(
    samples: dict[str, Sequence[dict]],
    generator: Callable,
    features: Callable,
    out: str | os.PathLike,
    about: dict,
    *,
    emotions: Sequence[str] = EMOTIONS,
    pooling: str = "mean",
    threshold: float = THRESHOLD,
    near_duplicate: float = NEAR,
    negatives: int | str = "lowest",
    fitting_only: bool = False,
    seed: int = 0,
    chunk_size: int = CHUNK,
    plain_text: bool = False,
    progress: bool = True,
) -> dict:
    """
    Write OUT/data/{split}-00000-of-00001-{digest}.parquet (`pairs.pair_features`), a card that lets
    `datasets.load_dataset(OUT)` find these files, report.json and audit.html. A split without pairs has no file.

    Every process of `accelerate launch` makes the same call, and all calls return once OUT is complete. The output
    depends only on the arguments, not on the number of processes or on interruptions. Repeating a finished run does
    nothing. A sample that cannot be used is left out and reported; it does not end the run.

    Args:
        samples: samples of each split, such as `DialogueSamples`: `prompt` (messages), `reply`, `corpus`, `split`,
            `dialogue_id`, `turn`, `utterance_id` and `emotion` (emotion of the sentence or None).
        generator: function that returns the generator (see `generators`). Called only if there are replies to generate.
        features: function that returns the `EmotionFeatures`. Called only if there are replies to generate.
        out: the folder OUT, created if needed. Pairs of an earlier run are replaced.
        about: everything but the samples, emotions and seed that the candidates and their similarities depend on: the
            options of the generator and, under `identity`, the identity of the weights (`identity_of`), which the
            report omits. Strings, numbers, lists and dicts. Candidates with a different `about` are not reused.
        emotions: emotions to write candidates for, out of the seven.
        pooling: pooling of the emotion features that the selection uses.
        threshold: a pair is kept if the similarity of the rejected reply is strictly below the threshold.
        near_duplicate: see `pairs.drop_reasons`.
        negatives: the number of rejected replies of a row. "lowest": one, the least similar. "all", or a number:
            further candidates below the threshold are also kept, in the column `negatives`, the least similar first.
        fitting_only: whether to leave out samples whose true reply does not fit the emotion of the sentence
            (`pairs.misfit_reason`). EPO amplifies what the true replies do, whether it fits or not.
        seed: sampling seed; the seed of each candidate also depends on the ids of its sample and its emotion.
        chunk_size: samples per chunk.
        plain_text: if True, the prompts contain no clips and their contents are strings.
        progress: whether to show a progress bar.

    Returns:
        The content of report.json: `settings`, `pairs` and `splits`.

    Raises:
        FolderInUseError: if another run writes to `out`.
        ValueError: if the emotions, the pooling, `negatives` or `chunk_size` are invalid, if media is neither a path
            nor bytes, or if `out` contains a prepared corpus.
    """
    check_out(out)
    emotions = list(dict.fromkeys(emotions))
    if not emotions or set(emotions) - set(EMOTIONS):
        raise ValueError(f"The emotions are {emotions}; choose from {', '.join(EMOTIONS)}.")
    if pooling not in POOLINGS:
        raise ValueError(f"The pooling {pooling!r} is not one of {', '.join(POOLINGS)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least 1 sample.")
    limit = negatives_limit(negatives)
    out, state = Path(out), PartialState(timeout=PATIENCE)
    writing = _plain({**about, "emotions": emotions, "seed": seed})
    selecting = {"pooling": pooling, "threshold": threshold, "near_duplicate": near_duplicate, "plain_text": plain_text}
    if limit != 1:  # absent otherwise, so that runs of earlier versions stay complete
        selecting["negatives"] = "all" if limit is None else limit
    if fitting_only:  # likewise
        selecting["fitting_only"] = True
    work = out / WORK / fingerprint(writing)[:16]
    chunks = [chunk for split, part in samples.items() for chunk in _chunks(split, part, chunk_size)]
    media = None if plain_text else {split: _media_digest(part) for split, part in samples.items()}
    wanted = {**writing, **selecting, "chunks": [chunk.file for chunk in chunks], "media": media}
    with held_folder(out, "empathic counter") if state.is_main_process else nullcontext():
        if _is_done(out, wanted):
            logger.info("%s is complete; nothing to do.", out)
            return json.loads((out / "report.json").read_text(encoding="utf-8"))
        state.wait_for_everyone()  # until every process has checked OUT, nothing may change there
        if state.is_main_process:
            _open_work(work, writing)
        state.wait_for_everyone()
        mine = [
            chunk for chunk in chunks[state.process_index :: state.num_processes] if not (work / chunk.file).exists()
        ]
        if mine:
            writer, encoder = generator(), features()
            bar = tqdm(
                total=sum(chunk.end - chunk.start for chunk in mine),
                desc="counter-emotional replies",
                unit="sample",
                disable=not (progress and state.is_local_main_process),
            )
            with bar:
                for chunk in mine:
                    part = [samples[chunk.split][i] for i in range(chunk.start, chunk.end)]
                    content = write_candidates(part, writer, encoder, emotions, seed)
                    write_json(work / chunk.file, content, indent=None, ensure_ascii=False)
                    bar.update(len(part))
        state.wait_for_everyone()
        if state.is_main_process:
            settings = {name: value for name, value in writing.items() if name != "identity"} | selecting
            files = _merge(samples, out, work, chunks, settings)
            write_json(out / WORK / "done.json", {"wanted": wanted, "files": files}, indent=None, ensure_ascii=False)
        state.wait_for_everyone()
        return json.loads((out / "report.json").read_text(encoding="utf-8"))


def check_out(out: str | os.PathLike, data: str | os.PathLike | None = None) -> None:
    """ValueError if the pairs would replace a prepared corpus: the input `data` or any other prepared corpus."""
    if data is not None and Path(out).resolve() == Path(data).resolve():
        raise ValueError(f"{out} is the input dataset, which the pairs would replace. Choose another folder.")
    if (Path(out) / STATE_FILE).exists():
        raise ValueError(f"{out} contains a prepared dataset, which the pairs would replace. Choose another folder.")


def write_candidates(samples: Sequence[dict], generator, features, emotions: Sequence[str], seed: int) -> list[dict]:
    """
    Generate the replies to some samples and their similarities to the true replies.

    Returns:
        A dict per sample with `item` and either `reason`, why the sample cannot be answered, or `candidates` in the
        order of `emotions`: `emotion`, `text` (may be empty), `finished` and `similarities` (pooling -> cosine, or None
        for an empty text).
    """
    results, prompts, seeds, answered = [], [], [], []
    for sample in samples:
        name = sample_name(sample)
        try:
            if not (sample["reply"] or "").strip():
                raise ValueError("the true reply is empty")
            mine = [generator.prompt(sample["prompt"], emotion) for emotion in emotions]
        except ValueError as error:
            results.append({"item": name, "reason": str(error)})
            continue
        prompts += mine
        seeds += [f"{seed} {name} {emotion}" for emotion in emotions]
        results.append({"item": name})
        answered.append((results[-1], sample["reply"]))
    replies = iter(generator.replies(prompts, seeds))
    for result, _ in answered:
        result["candidates"] = [
            {"emotion": emotion, "text": reply.text, "finished": reply.finished}
            for emotion, reply in zip(emotions, replies, strict=False)
        ]
    scored = [
        (candidate, reply)
        for result, reply in answered
        for candidate in result["candidates"]
        if candidate["text"].strip()
    ]
    for result, _ in answered:
        for candidate in result["candidates"]:
            candidate["similarities"] = dict.fromkeys(POOLINGS)
    if scored:
        vectors = features.encode_all([text for candidate, reply in scored for text in (candidate["text"], reply)])
        for pooling, rows in vectors.items():
            for (candidate, _), value in zip(scored, cosine(rows[::2], rows[1::2]), strict=True):
                candidate["similarities"][pooling] = round(float(value), 6)
    return results


# ------------------------------------------------------------------------------------------------------ work files


class Chunk(NamedTuple):
    """Samples `start` to `end` of a split. The file name `file` has a digest of all that their replies depend on."""

    split: str
    start: int
    end: int
    file: str


def _plain(content):
    """Convert content to what a round trip through JSON returns, for comparison with stored content."""
    return json.loads(json.dumps(content))


def _chunks(split: str, samples: Sequence[dict], size: int) -> list[Chunk]:
    """The chunks of a split. Naming the chunks reads no clip."""
    in_turns = isinstance(samples, DialogueSamples)
    rows = hashlib.sha256()
    if in_turns:
        columns = ["corpus", "split", "dialogue_id", "turn", "utterance_id", "speaker", "text", "emotion"]
        for batch in samples.texts.select_columns(columns).iter(1000):
            rows.update(json.dumps([batch[name] for name in columns]).encode())
    chunks = []
    for start in range(0, len(samples), size):
        end = min(start + size, len(samples))
        part = samples.places[start:end].tolist() if in_turns else [_texts(samples[i]) for i in range(start, end)]
        name = fingerprint([rows.hexdigest(), part])[:16]
        chunks.append(Chunk(split, start, end, f"{split}-{start:09d}-{name}.json"))
    return chunks


def _media_digest(samples: Sequence[dict]) -> str:
    """Digest of the clips that the pairs store: of their bytes or, where the pairs name a file, of its path."""
    digest, digests = hashlib.sha256(), Digests()
    if isinstance(samples, DialogueSamples):
        media = samples.dataset.select_columns(list(MEDIA_KINDS))
        found = (media[row - 1] for row in samples.places[:, 1].tolist())
    else:
        found = ({kind: clip_of(samples[i]["prompt"], kind) for kind in MEDIA_KINDS} for i in range(len(samples)))
    for clips in found:
        items = (clips[kind] or {} for kind in MEDIA_KINDS)
        stored = [digests.of(item) if item.get("bytes") is not None else item.get("path") for item in items]
        digest.update(json.dumps(stored).encode())
    return digest.hexdigest()


def _texts(sample: dict) -> list:
    prompt = [[message.get("role"), message.get("name"), message_text(message)] for message in sample["prompt"]]
    return [sample_name(sample), sample["emotion"], prompt, sample["reply"]]


def identity_of(name: str, config: str = "config.json", revision: str | None = None) -> list:
    """
    Identity of a checkpoint, which changes when the checkpoint changes: for a folder, the names, sizes and times of its
    files and of the files of its base stages; for a Hub id, the commit.

    Args:
        name: folder or Hub id.
        config: a file that the checkpoint has; `adapter_config.json` for a PEFT adapter.
        revision: revision of a Hub id; the newest by default.
    """
    folder = Path(name)
    if not folder.is_dir():
        return [name, Path(cached_file(name, config, revision=revision)).parent.name]
    found = [path for path in (*folder.iterdir(), *folder.glob("memory_tokenizer/*")) if path.is_file()]
    files = [[path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns] for path in found]
    stage = read_stage(name) or {"base": {}}
    base, revision = stage["base"], stage.get("base_revision")
    bases = [base] if isinstance(base, str) else [base[part] for part in PART_NAMES if part in base]
    return [sorted(files), *(identity_of(resolve_base(name, part), revision=revision) for part in bases)]


def _open_work(work: Path, writing: dict) -> None:
    """Create the folder of the chunks for these settings; the folders for other settings stay."""
    work.parent.mkdir(parents=True, exist_ok=True)
    (work.parent / "done.json").unlink(missing_ok=True)
    if not work.exists():
        others = [json.loads(file.read_text(encoding="utf-8")) for file in work.parent.glob("*/settings.json")]
        changes = [sorted(n for n in {*old, *writing} if old.get(n) != writing.get(n)) for old in others]
        if changes:
            logger.warning(
                f"{work.parent} has candidates for other settings (different: {', '.join(min(changes, key=len))}); "
                "they are not reused, and all candidates are written again."
            )
        work.mkdir()
    write_json(work / "settings.json", writing, indent=None, ensure_ascii=False)
    for partial in work.glob("*.part"):
        partial.unlink()


def _is_done(out: Path, wanted: dict) -> bool:
    """Whether OUT has all files of a finished run with the same arguments."""
    file = out / WORK / "done.json"
    if not file.exists():
        return False
    done = json.loads(file.read_text(encoding="utf-8"))
    return done["wanted"] == wanted and all((out / name).exists() for name in done["files"])


# ----------------------------------------------------------------------------------------------------- final files


def _merge(samples: dict[str, Sequence[dict]], out: Path, work: Path, chunks: list[Chunk], settings: dict) -> list[str]:
    """Select the pairs and write the files of OUT, one sample at a time; returns the file names."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    pooling, threshold, plain_text = settings["pooling"], settings["threshold"], settings["plain_text"]
    limit = negatives_limit(settings.get("negatives", "lowest"))
    audits, written = {}, []
    for split, part in samples.items():
        audit = audits[split] = Audit(settings["emotions"], pooling, threshold, limit)
        with PairWriter(data / f"{split}.part", plain_text, limit != 1) as file:
            for place, result in enumerate(_results(work, [chunk for chunk in chunks if chunk.split == split])):
                sample = part[place]
                if "reason" in result:
                    audit.leave_out(sample, result["reason"])
                    continue
                candidates = result["candidates"]
                if settings.get("fitting_only") and (reason := misfit_reason(sample["emotion"], candidates, pooling)):
                    audit.leave_out(sample, reason)
                    continue
                texts = [candidate["text"] for candidate in candidates]
                reasons = drop_reasons(sample["reply"], texts, settings["near_duplicate"])
                for candidate, reason in zip(candidates, reasons, strict=True):
                    candidate["dropped"] = reason
                rejected = audit.add(sample, candidates)
                if rejected:
                    further = None if limit == 1 else rejected[1:]
                    file.write(make_row(sample, candidates, rejected[0], pooling, plain_text, further))
        if file.rows:
            written.append(split)
    names = publish_parquet(data, written)
    report = {
        "settings": settings,
        "pairs": sum(audit.pairs for audit in audits.values()),
        "splits": {split: audit.report() for split, audit in audits.items()},
    }
    for split, audit in audits.items():
        for warning in audit.warnings():
            logger.warning(f"{split}: {warning}")
    (out / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "audit.html").write_text(page(audits, settings), encoding="utf-8")
    if names:
        (out / "README.md").write_text(_card(report, names), encoding="utf-8")
    else:  # pairs of an earlier run would be mistaken for pairs of this run
        (out / "README.md").unlink(missing_ok=True)
        for old in data.glob("*.parquet"):
            old.unlink()
    return ["report.json", "audit.html", *(["README.md"] if names else []), *(f"data/{n}" for n in names.values())]


def _results(work: Path, chunks: list[Chunk]) -> Iterator[dict]:
    for chunk in chunks:
        yield from json.loads((work / chunk.file).read_text(encoding="utf-8"))


def _card(report: dict, names: dict[str, str]) -> str:
    table = ""
    for split in names:
        counts = report["splits"][split]
        chosen = {emotion: 0 for emotion in report["settings"]["emotions"]}
        for row in counts["rejected_emotions"].values():
            for emotion, count in row.items():
                chosen[emotion] += count
        text = ", ".join(f"{emotion} {count}" for emotion, count in chosen.items())
        table += f"| {split} | {counts['samples']} | {counts['pairs']} | {text} |\n"
    settings = report["settings"]
    more = ""
    if "negatives" in settings:
        replies = sum(report["splits"][split]["negatives"]["replies"] for split in names)
        most = "" if settings["negatives"] == "all" else f", up to {settings['negatives']} in a row"
        more = (
            "\nA row may have several rejected replies: `rejected` is the least similar one, and the list `negatives` "
            "has the further\ncandidates below the same threshold, the least similar first. The rows have "
            f"{replies} rejected replies in all{most}.\n"
        )
    if "fitting_only" in settings:
        more += (
            "\nThe true replies fit the emotion of the sentence: no candidate is more similar to the true reply than "
            "the candidate\nthat was written for this emotion.\n"
        )
    return f"""{card_header(names)}
# Counter-emotional preference pairs

For any preference trainer that reads `prompt`, `chosen` and `rejected`. The chosen reply is the true reply. A model
wrote one candidate per emotion; the rejected reply is the candidate least similar in emotion to the true reply, if the
cosine is below {settings["threshold"]} (features of a text emotion classifier, pooling `{settings["pooling"]}`).

| split | samples | pairs | emotions of the rejected replies |
|---|---|---|---|
{table}{more}
`candidates` has all candidates with their similarities. `report.json` has all settings, and every sample that was left
out, with the reason; `audit.html` shows the distribution of the similarities, with examples.
"""


# --------------------------------------------------------------------------------------------------------- command


def run(options: argparse.Namespace) -> int:
    """Run `empathic counter`; returns the exit status: 0 if there are pairs, else 1."""
    check_out(options.out, options.data)
    history = options.history or ("memory" if options.generator is None else "text")
    if options.generator is None and options.backend == "vllm":
        raise ValueError("--backend vllm needs a text model; give it with --generator.")
    if options.generator is not None and (options.use_adapter or history == "memory"):
        raise ValueError("--use_adapter and --history memory are for --model, not for --generator.")
    state = PartialState(cpu=options.device == "cpu", timeout=PATIENCE)
    if options.backend == "vllm" and state.num_processes > 1:
        raise ValueError("For several GPUs start one process with --tensor_parallel_size N.")
    device = str(state.device) if options.device in (None, "cpu") or state.num_processes > 1 else options.device
    sampling = Sampling(options.max_new_tokens, not options.greedy, options.temperature, options.top_p, options.top_k)
    name = options.model if options.generator is None else options.generator
    negatives_limit(options.negatives)
    # Everything that can be checked is checked before the data and the models are loaded.
    identity = []
    for option, source in (
        ("--model" if options.generator is None else "--generator", name),
        ("--classifier", options.classifier),
    ):
        with loading(source, option):
            identity.append(identity_of(source))

    def generator():
        if options.backend == "vllm":
            return VllmGenerator(name, history, sampling, options.dtype, options.tensor_parallel_size)
        if options.generator is not None:
            return CausalGenerator(name, history, sampling, options.batch_size, device, options.dtype)
        model = EmpathicForConditionalGeneration.from_pretrained(name, dtype=options.dtype).to(device)
        processor = EmpathicProcessor.from_pretrained(name)
        return EmpathicGenerator(model, processor, history, options.use_adapter, sampling, options.batch_size)

    samples = {}
    for split in options.splits:
        samples[split] = DialogueSamples(load_prepared(options.data, split), options.speakers)
        if options.max_samples is not None:
            samples[split].places = samples[split].places[: options.max_samples]
    about = {
        "generator": name,
        "adapters": "on" if options.use_adapter else "off",
        "backend": options.backend,
        "dtype": options.dtype,
        "history": history,
        "batch_size": options.batch_size,
        "sampling": sampling.recorded(name),
        **ALWAYS,
        "classifier": options.classifier,
        "identity": identity,
    }
    report = counter_pairs(
        samples,
        generator,
        lambda: EmotionFeatures(options.classifier, device=device),
        options.out,
        about,
        emotions=options.emotions or EMOTIONS,
        pooling=options.pooling,
        threshold=options.threshold,
        near_duplicate=options.near_duplicate,
        seed=options.seed,
        negatives=options.negatives,
        fitting_only=options.fitting_only,
        chunk_size=options.chunk_size,
        plain_text=options.plain_text,
    )
    if state.is_main_process:
        print(summary(report, options.out))
    return 0 if report["pairs"] else 1


def summary(report: dict, out: str) -> str:
    """Summary of the report for the user, a few lines per split."""
    lines = []
    for split, counts in report["splits"].items():
        lines.append(f"{split}: {counts['pairs']} pairs of {counts['samples']} samples")
        if "negatives" in counts:
            lines.append(f"  with {counts['negatives']['replies']} rejected replies")
        shares = [f"{name} {share:.1%}" for name, share in counts["passed_threshold"].items() if share is not None]
        if shares:
            lines.append(f"  below the threshold {report['settings']['threshold']} by pooling: {', '.join(shares)}")
        lines += [f"  WARNING: {warning}" for warning in counts["warnings"]]
    return "\n".join([*lines, f"{report['pairs']} pairs are in {out}; look at {Path(out) / 'audit.html'}."])


def main(argv: list[str] | None = None) -> int:
    """Entry point of `accelerate launch -m empathic.data_prep.counter.build`; same options as `empathic counter`."""
    parser = argparse.ArgumentParser(
        prog="empathic.data_prep.counter.build", description="Counter-emotional preference pairs."
    )
    add_options(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    leave(run_program("empathic counter", main))

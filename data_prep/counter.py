"""
Counter-emotional replies and the preference pairs made of them (paper's Sec. 3.3 and 8; Fig. 4 and 8, Table 7).

For each sample the same LLM that is to be trained answers the sentence once for each emotion, as if it had been said
with that feeling (`candidates`). The candidate whose emotion is least like the true reply's becomes the rejected reply,
if its similarity is below a threshold (`pairs`). A page shows what came of it (`audit`).

The work is cut into chunks of samples, whatever the number of processes:

    accelerate launch -m empathic.data_prep.counter --model runs/dialogue --data data/meld --out data/meld-pairs

Each finished chunk is a file in OUT/.work with all candidates and their similarities under every pooling. So a run that
was killed goes on after its last chunks, and another threshold or pooling writes no candidate again.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from datasets import load_dataset
from tqdm import tqdm
from transformers.utils import cached_file, logging

from empathic.composition_empathic import read_stage, resolve_base
from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.audit import Audit, page
from empathic.data_prep.candidates import (
    CausalGenerator,
    EmpathicGenerator,
    VllmGenerator,
    message_text,
)
from empathic.data_prep.counter_options import add_options
from empathic.data_prep.pairs import NEAR, THRESHOLD, PairWriter, drop_reasons, make_row, sample_name
from empathic.data_prep.pipeline import STATE
from empathic.data_prep.views import DialogueSamples
from empathic.data_prep.writer import card_header, publish_parquet
from empathic.evaluation.emotion_features import POOLINGS, EmotionFeatures
from empathic.evaluation.metrics import cosine
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.sampling import Sampling

logger = logging.get_logger(__name__)

WORK = ".work"  # in OUT: a folder of chunks for each setting they were written under; done.json once OUT is whole
CHUNK = 64
PATIENCE = timedelta(days=30)  # a process waits so long for the slowest one


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
    seed: int = 0,
    chunk_size: int = CHUNK,
    plain_text: bool = False,
    progress: bool = True,
) -> dict:
    """
    Writes OUT/data/{split}-00000-of-00001-{digest}.parquet (`pairs.pair_features`), a card by which
    `datasets.load_dataset(OUT)` finds them, report.json and audit.html. A split without pairs has no file.

    Every process of `accelerate launch` calls it alike; all return once OUT is whole. What is written depends on the
    arguments alone: not on the number of processes, nor on whether and where the run was interrupted. A finished run
    that is called again does nothing. A sample that cannot be used is reported and left out; none ends the run.

    Args:
        samples: of each split, such as `DialogueSamples`: `prompt` (messages), `reply`, `corpus`, `split`,
            `dialogue_id`, `turn`, `utterance_id` and `emotion` (of the sentence, may be None).
        generator: gives the generator (see `candidates`). Called only if there are replies to write.
        features: gives the `EmotionFeatures`. Likewise.
        out: a folder; made if it is not there. An earlier run's pairs are replaced.
        about: what the candidates and their similarities depend on beside the samples, emotions and seed: the options
            of the generator, and under `identity`, which the report leaves out, that of the weights (`identity_of`).
            Strings, numbers, lists and dicts. Candidates that were written under another one are not used.
        emotions: of the seven.
        pooling, threshold: of the selection. A pair is kept if the rejected reply's similarity is strictly below.
        near_duplicate: see `pairs.drop_reasons`.
        seed: with a sample's ids and the emotion it decides what is sampled.
        chunk_size: samples that are written together.
        plain_text: the prompts are written without clips, their contents as strings.
        progress: shows a bar.

    Returns:
        The content of report.json: `settings`, `pairs` and `splits`.

    Raises:
        ValueError: for unknown emotions or pooling, media that is neither a path nor bytes, or an `out` that holds a
            prepared corpus.
    """
    check_out(out)
    emotions = list(dict.fromkeys(emotions))
    if not emotions or set(emotions) - set(EMOTIONS):
        raise ValueError(f"The emotions are {emotions}; take some of {', '.join(EMOTIONS)}.")
    if pooling not in POOLINGS:
        raise ValueError(f"The pooling {pooling!r} is not one of {', '.join(POOLINGS)}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least 1 sample.")
    out, state = Path(out), PartialState(timeout=PATIENCE)
    writing = _plain({**about, "emotions": emotions, "seed": seed})
    selecting = {"pooling": pooling, "threshold": threshold, "near_duplicate": near_duplicate, "plain_text": plain_text}
    work = out / WORK / _digest(writing)[:16]
    chunks = [chunk for split, part in samples.items() for chunk in _chunks(split, part, chunk_size)]
    wanted = {**writing, **selecting, "chunks": [chunk.file for chunk in chunks]}
    if _is_done(out, wanted):
        logger.info("%s is whole.", out)
        return json.loads((out / "report.json").read_text(encoding="utf-8"))
    state.wait_for_everyone()  # before anything is changed that another process has yet to look at
    if state.is_main_process:
        _open_work(work, writing)
    state.wait_for_everyone()
    mine = [chunk for chunk in chunks[state.process_index :: state.num_processes] if not (work / chunk.file).exists()]
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
                _write_json(work / chunk.file, write_candidates(part, writer, encoder, emotions, seed))
                bar.update(len(part))
    state.wait_for_everyone()
    if state.is_main_process:
        settings = {name: value for name, value in writing.items() if name != "identity"} | selecting
        files = _merge(samples, out, work, chunks, settings)
        _write_json(out / WORK / "done.json", {"wanted": wanted, "files": files})
    state.wait_for_everyone()
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def check_out(out: str | os.PathLike, data: str | os.PathLike | None = None) -> None:
    """ValueError if the pairs would replace a prepared corpus: `data`, from which they are made, or another one."""
    if data is not None and Path(out).resolve() == Path(data).resolve():
        raise ValueError(f"{out}: is the data set itself, which the pairs would replace. Choose another folder.")
    if (Path(out) / STATE).exists():
        raise ValueError(f"{out}: holds a prepared data set, which the pairs would replace. Choose another folder.")


def write_candidates(samples: Sequence[dict], generator, features, emotions: Sequence[str], seed: int) -> list[dict]:
    """
    The replies to some samples and their similarities to the true replies.

    Returns:
        for each sample `item`, and either `reason`, why it cannot be answered, or `candidates` in the order of
        `emotions`: `emotion`, `text` (may be empty), `finished` and `similarities`: {pooling: cosine, or None for an
        empty text}.
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
    """Samples `start` to `end` of a split; `file` names them by all that their replies depend on."""

    split: str
    start: int
    end: int
    file: str


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(content):
    """As JSON gives it back."""
    return json.loads(json.dumps(content))


def _chunks(split: str, samples: Sequence[dict], size: int) -> list[Chunk]:
    """The chunks of a split. No clip is read to name them."""
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
        name = _digest([rows.hexdigest(), part])[:16]
        chunks.append(Chunk(split, start, end, f"{split}-{start:09d}-{name}.json"))
    return chunks


def _texts(sample: dict) -> list:
    prompt = [[message.get("role"), message.get("name"), message_text(message)] for message in sample["prompt"]]
    return [sample_name(sample), sample["emotion"], prompt, sample["reply"]]


def identity_of(name: str) -> list:
    """
    What tells whether a checkpoint has changed: the names, sizes and times of a folder's files, and those of the stages
    it is based on; the commit of a Hub id.
    """
    folder = Path(name)
    if not folder.is_dir():
        return [name, Path(cached_file(name, "config.json")).parent.name]
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in folder.iterdir() if path.is_file()]
    base = (read_stage(name) or {"base": {}})["base"]
    bases = [base] if isinstance(base, str) else [part for part in base.values() if isinstance(part, str)]
    return [sorted(files), *(identity_of(resolve_base(name, part)) for part in bases)]


def _write_json(path: Path, content) -> None:
    """Writes the whole file or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _open_work(work: Path, writing: dict) -> None:
    """Makes the folder of the chunks that are written under these settings; those of other settings stay."""
    work.parent.mkdir(parents=True, exist_ok=True)
    (work.parent / "done.json").unlink(missing_ok=True)
    if not work.exists():
        others = [json.loads(file.read_text(encoding="utf-8")) for file in work.parent.glob("*/settings.json")]
        changes = [sorted(n for n in {*old, *writing} if old.get(n) != writing.get(n)) for old in others]
        if changes:
            logger.warning(
                f"{work.parent} holds candidates that were written under other settings "
                f"({', '.join(min(changes, key=len))}): they are not used, and the work starts anew."
            )
        work.mkdir()
    _write_json(work / "settings.json", writing)
    for partial in work.glob("*.tmp"):
        partial.unlink()


def _is_done(out: Path, wanted: dict) -> bool:
    """Whether an earlier run of the same arguments is whole."""
    file = out / WORK / "done.json"
    if not file.exists():
        return False
    done = json.loads(file.read_text(encoding="utf-8"))
    return done["wanted"] == wanted and all((out / name).exists() for name in done["files"])


# ----------------------------------------------------------------------------------------------------- final files


def _merge(samples: dict[str, Sequence[dict]], out: Path, work: Path, chunks: list[Chunk], settings: dict) -> list[str]:
    """Selects and writes the files of OUT, one sample at a time; returns their names."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    pooling, threshold, plain_text = settings["pooling"], settings["threshold"], settings["plain_text"]
    audits, written = {}, []
    for split, part in samples.items():
        audit = audits[split] = Audit(settings["emotions"], pooling, threshold)
        with PairWriter(data / f"{split}.part", plain_text) as file:
            for place, result in enumerate(_results(work, [chunk for chunk in chunks if chunk.split == split])):
                sample = part[place]
                if "reason" in result:
                    audit.leave_out(sample, result["reason"])
                    continue
                candidates = result["candidates"]
                texts = [candidate["text"] for candidate in candidates]
                reasons = drop_reasons(sample["reply"], texts, settings["near_duplicate"])
                for candidate, reason in zip(candidates, reasons, strict=True):
                    candidate["dropped"] = reason
                index = audit.add(sample, candidates)
                if index is not None:
                    file.write(make_row(sample, candidates, index, pooling, plain_text))
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
    else:  # pairs of an earlier run would be taken for this one's
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
    return f"""{card_header(names)}
# Counter-emotional preference pairs

For any preference trainer that reads `prompt`, `chosen` and `rejected`. Chosen is the true reply. Rejected is, of the
replies that a model wrote for each emotion, the one least like the true reply in emotion, if their cosine is below
{settings["threshold"]} (features of a text emotion classifier, pooling `{settings["pooling"]}`).

| split | samples | pairs | emotions of the rejected replies |
|---|---|---|---|
{table}
`candidates` holds all that were written, with their similarities. `report.json` has all settings, and names what was
left out, and why; `audit.html` shows how the similarities lie, with examples to read.
"""


# --------------------------------------------------------------------------------------------------------- command


def run(options: argparse.Namespace) -> int:
    """What `empathic counter` does; returns its exit status: 0 if there are pairs, else 1."""
    try:
        check_out(options.out, options.data)
    except ValueError as error:
        raise SystemExit(f"empathic counter: {error}") from None
    history = options.history or ("memory" if options.generator is None else "text")
    if options.generator is None and options.backend == "vllm":
        raise SystemExit("empathic counter: --backend vllm writes with a text model; name it by --generator.")
    if options.generator is not None and (options.use_adapter or history == "memory"):
        raise SystemExit("empathic counter: --use_adapter and --history memory are for --model, not for --generator.")
    state = PartialState(cpu=options.device == "cpu", timeout=PATIENCE)
    if options.backend == "vllm" and state.num_processes > 1:
        raise SystemExit("empathic counter: vLLM divides its work itself: start one process, --tensor_parallel_size N.")
    device = str(state.device) if options.device in (None, "cpu") or state.num_processes > 1 else options.device
    sampling = Sampling(options.max_new_tokens, not options.greedy, options.temperature, options.top_p, options.top_k)
    name = options.model if options.generator is None else options.generator

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
        samples[split] = DialogueSamples(load_dataset(options.data, split=split), options.speakers)
        if options.max_samples is not None:
            samples[split].places = samples[split].places[: options.max_samples]
    about = {
        "generator": name,
        "adapters": "on" if options.use_adapter else "off",
        "backend": options.backend,
        "dtype": options.dtype,
        "history": history,
        "batch_size": options.batch_size,
        "sampling": vars(sampling),
        "classifier": options.classifier,
        "identity": [identity_of(name), identity_of(options.classifier)],
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
        chunk_size=options.chunk_size,
        plain_text=options.plain_text,
    )
    if state.is_main_process:
        print(summary(report, options.out))
    return 0 if report["pairs"] else 1


def summary(report: dict, out: str) -> str:
    """What a user has to know, a few lines a split."""
    lines = []
    for split, counts in report["splits"].items():
        lines.append(f"{split}: {counts['pairs']} pairs of {counts['samples']} samples")
        shares = [f"{name} {share:.1%}" for name, share in counts["passed_threshold"].items() if share is not None]
        if shares:
            lines.append(f"  below the threshold {report['settings']['threshold']} by pooling: {', '.join(shares)}")
        lines += [f"  WARNING: {warning}" for warning in counts["warnings"]]
    return "\n".join([*lines, f"{report['pairs']} pairs are in {out}; look at {Path(out) / 'audit.html'}."])


def main(argv: list[str] | None = None) -> int:
    """The same as `empathic counter`, for `accelerate launch -m empathic.data_prep.counter`."""
    parser = argparse.ArgumentParser(
        prog="empathic.data_prep.counter", description="Counter-emotional preference pairs."
    )
    add_options(parser)
    try:
        return run(parser.parse_args(argv))
    finally:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())

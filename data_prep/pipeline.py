"""Write the dialogues of an adapter as parquet files, card and report; clips are opened, chosen and cut in parallel.

Dialogues are collected into shards of about a thousand turns. A finished shard is stored in OUT/.work under a
fingerprint of its turns and of the size and times of their clips, so that a run that was killed resumes where it
stopped. Only when all shards are finished are they renamed and replace the files of an earlier run, together with the
card and the report. The output does not depend on the time or on the number of workers: equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from ..configuration_empathic import EMOTIONS
from ..media_empathic import MediaError, lone_channel
from .clip_digests import file_state
from .corpora.base import Clip, CorpusInfo, Dialogue, Report, Turn
from .cutting import cut
from .streams import usable_streams
from .writer import (
    add_counts,
    beside_published,
    corpus_card,
    file_digest,
    find_shards,
    media_struct,
    publish_shards,
    remove_other_shards,
    replace_file,
    sorted_splits,
    to_json,
    write_rows,
)

OUTPUT_FORMAT = 2  # version of the output: increase it when the same turns give other rows
SHARD_TURNS = 1000
SHARD_BYTES = 256 * 2**20  # of embedded media
LARGEST = 2**31 - 2**20  # bytes of a clip that fit into a parquet cell
LONG = 120  # seconds: the longest audio that the model uses
STATE_FILE = ".prepared.json"
MEDIA_FILES = {"audio": ("audio", ".wav"), "video": ("video", ".mp4")}
LISTS = ("left_out", "repaired", "without_media")


@dataclass(frozen=True)
class OptionalClip(Clip):
    """A clip that may lack the audio (or video) stream it is listed for, without an entry in the report."""


# Clips ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Chosen:
    """The file chosen as the audio or video of a turn."""

    path: Path
    name: str
    source: Clip
    seconds: float | None
    cut_key: str | None = None
    lone_channel: int | None = None  # the channel that is used alone because the channels cancel in the mix


@dataclass
class _Found:
    """The chosen clips of a turn, and the report entries on its clips: (list of the report, reason)."""

    audio: _Chosen | None = None
    video: _Chosen | None = None
    notes: list[tuple[str, str]] = field(default_factory=list)


def _together(items: dict[str, str], text: Callable[[str, str], str]) -> Iterator[str]:
    """Yield one text per distinct reason, naming both kinds if they share the reason. items: kind -> reason."""
    kinds: dict[str, list[str]] = {}
    for kind, reason in items.items():
        kinds.setdefault(reason, []).append(MEDIA_FILES[kind][0])
    for reason, names in kinds.items():
        yield text(reason, " and ".join(names))


class _Clips:
    """
    Choose and cut the clips of turns; used by several threads at once.

    Args:
        folder: folder for the cut clips.
        embed: whether the cut clips are temporary.
        cuts: clips that earlier runs have cut: path in `folder` -> fingerprint of the cut.
    """

    def __init__(self, folder: Path, embed: bool, cuts: dict[str, str]):
        self.folder, self.embed, self.cuts = folder, embed, cuts
        self.inspect = lru_cache(maxsize=4096)(usable_streams)  # the turns of a dialogue may share a file

    def find(self, turn: Turn, stem: str, stats: dict[Path, list[int] | None]) -> _Found:
        """
        Open the candidate clips of a turn and choose its audio and video.

        Args:
            turn: the turn.
            stem: `split/dialogue/utterance`, the path of cut files without suffix.
            stats: the `file_state` of each candidate.
        """
        found = _Found()
        lacking, stood_in = {}, {}
        for kind, candidates in (("audio", turn.audio), ("video", turn.video)):
            chosen, failed = None, []
            for clip in candidates:
                chosen = self._use(clip, kind, stem, stats, failed)
                if chosen is not None:
                    break
            setattr(found, kind, chosen)
            reason = " ".join(dict.fromkeys(failed))
            if failed and chosen is None:
                lacking[kind] = reason
            elif failed:
                stood_in[kind] = f"{reason} {chosen.source.name} is used for its"
        if turn.needs_media and found.audio is None and found.video is None:
            reasons = " ".join(dict.fromkeys(lacking.values()))
            found.notes.append(("left_out", reasons or "it has no clip."))
            return found
        for text in _together(stood_in, lambda reason, kinds: f"{reason} {kinds}."):
            found.notes.append(("repaired", text))
        for text in _together(lacking, lambda reason, kinds: f"{reason} The turn is kept without its {kinds}."):
            found.notes.append(("without_media", text))
        long = {c.source.name: c.seconds for c in (found.audio, found.video) if c and (c.seconds or 0) > LONG}
        for name, seconds in long.items():
            found.notes.append(("repaired", f"{name}: lasts {seconds:.0f} s, over {LONG} s. It is kept unchanged."))
        if found.audio is not None and found.audio.lone_channel is not None:
            name, channel = found.audio.source.name, found.audio.lone_channel + 1
            text = f"{name}: its channels cancel each other when they are mixed. Channel {channel} is used alone."
            found.notes.append(("repaired", text))
        return found

    def _use(self, clip: Clip, kind: str, stem: str, stats: dict, failed: list[str]) -> _Chosen | None:
        """The file to use for a candidate. If it cannot be used, None; the reason, if any, is added to `failed`."""
        chosen = self._locate(clip, kind, stem, stats, failed)
        if chosen is None or kind == "video" or self.inspect(clip.path).channels == 1:
            return chosen
        try:
            chosen.lone_channel = lone_channel(chosen.path, LONG)
        except MediaError as error:
            failed.append(str(error).replace(str(chosen.path), clip.name))
            return None
        return chosen

    def _locate(self, clip: Clip, kind: str, stem: str, stats: dict, failed: list[str]) -> _Chosen | None:
        """The file of a candidate, which is cut first if it is part of a longer file; as `_use`."""
        media, what = self.inspect(clip.path), MEDIA_FILES[kind][0]
        if not media.holds(kind):
            if media.error:
                failed.append(media.error.replace(str(clip.path), clip.name))
            elif not isinstance(clip, OptionalClip):
                failed.append(f"{clip.name}: has no {what}.")
            return None
        if clip.is_whole:
            if not _is_utf8(f"{clip.path}{clip.name}"):
                failed.append(f"{clip.name}: its name is not UTF-8 and cannot be stored. Rename the file.")
                return None
            size = stats[clip.path][0] if stats[clip.path] else 0
            if self.embed and size > LARGEST:
                failed.append(f"{clip.name}: {size:,} bytes are too many to embed. Cut the file, or omit --embed.")
                return None
            return _Chosen(clip.path, clip.name, clip, media.duration)
        name = stem + MEDIA_FILES[kind][1]
        target = self.folder / name
        key = f"{OUTPUT_FORMAT} {clip.path} {stats[clip.path]} {clip.start} {clip.end} {clip.crop}"
        key = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
        if self.cuts.get(name) != key or not target.is_file():
            part = target.with_name(f".{target.stem}.part{target.suffix}")
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                cut(clip, part)
            except MediaError as error:
                failed.append(str(error).replace(str(clip.path), clip.name))
                return None
            os.replace(part, target)
        end = clip.end if clip.end is not None else media.duration
        seconds = None if end is None else end - (clip.start or 0.0)
        return _Chosen(target, name, clip, seconds, key)


# Shards --------------------------------------------------------------------------------------------------------------


@dataclass
class _Shard:
    """Dialogues of one split that are written to one parquet file."""

    split: str
    dialogues: list[Dialogue] = field(default_factory=list)
    turns: int = 0
    size: int = 0  # bytes of media, an estimate
    stats: dict[Path, list[int] | None] = field(default_factory=dict)  # clip -> file_state

    def fingerprint(self, corpus: str, embed: bool, options: dict) -> str:
        """Fingerprint of everything that the rows of the shard depend on."""

        def clips(found: Iterable[Clip]) -> list:
            return [
                [str(clip.path), clip.name, clip.start, clip.end, clip.crop, type(clip).__name__, self.stats[clip.path]]
                for clip in found
            ]

        dialogues = [
            [dialogue.dialogue_id]
            + [{**vars(turn), "audio": clips(turn.audio), "video": clips(turn.video)} for turn in dialogue.turns]
            for dialogue in self.dialogues
        ]
        content = json.dumps([OUTPUT_FORMAT, corpus, embed, options, self.split, dialogues], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def _stat(path: Path) -> list[int] | None:
    try:
        return file_state(path)
    except (OSError, ValueError):
        return None


def _is_utf8(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def _clean(dialogue: Dialogue, report: Report) -> None:
    """Replace lone surrogates, which a wrong escape in JSON produces and no file can store, with U+FFFD."""
    for holder in (dialogue, *dialogue.turns):
        for name in ("dialogue_id",) if holder is dialogue else ("utterance_id", "speaker", "text"):
            value = getattr(holder, name)
            clean = re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", value)
            if clean != value:
                where = dialogue.turns[0].where if holder is dialogue else holder.where
                report.repair(where, f"its {name} contains a lone surrogate. It was replaced with U+FFFD.")
                setattr(holder, name, clean)


def _check(dialogue: Dialogue, seen: set[tuple[str, str]]) -> None:
    """ValueError if an adapter gives a duplicate dialogue or an unknown emotion."""
    key = (dialogue.split, dialogue.dialogue_id)
    if key in seen:
        raise ValueError(f'The dialogue "{key[1]}" of split {key[0]} occurs twice. Its id must be unique in the split.')
    seen.add(key)
    for turn in dialogue.turns:
        if turn.emotion is not None and turn.emotion not in EMOTIONS:
            raise ValueError(f"{turn.where}: the emotion {turn.emotion!r} is not one of {', '.join(EMOTIONS)}.")


def _shards(dialogues: Iterable[Dialogue], report: Report, embed: bool) -> Iterator[_Shard]:
    """Yield shards of whole dialogues of one split as they fill up. Their content depends only on the arguments."""
    filling: dict[str, _Shard] = {}
    seen: set[tuple[str, str]] = set()
    for dialogue in dialogues:
        _clean(dialogue, report)
        _check(dialogue, seen)
        stats, size = {}, 0
        for turn in dialogue.turns:
            for clips in (turn.audio, turn.video):
                for place, clip in enumerate(clips):
                    known = clip.path in stats
                    stats[clip.path] = stats[clip.path] if known else _stat(clip.path)
                    # Count the first candidate only, and a recording that is cut only once for all of its turns.
                    if place == 0 and stats[clip.path] and (clip.is_whole or not known):
                        size += stats[clip.path][0]
        shard = filling.setdefault(dialogue.split, _Shard(dialogue.split))
        too_large = embed and shard.size + size > SHARD_BYTES
        if shard.turns and (shard.turns + len(dialogue.turns) > SHARD_TURNS or too_large):
            yield shard
            shard = filling[dialogue.split] = _Shard(dialogue.split)
        shard.dialogues.append(dialogue)
        shard.turns += len(dialogue.turns)
        shard.size += size
        shard.stats.update(stats)
    yield from (shard for shard in filling.values() if shard.turns)


def _file_name(name: str) -> str:
    """Convert a name to a file name that is valid on every file system and unique to the name."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80].lstrip(".")
    if safe == name and safe:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _stems(dialogue: Dialogue) -> list[str]:
    """The path `split/dialogue/utterance` of each turn, unique within the dialogue."""
    folder = f"{_file_name(dialogue.split)}/{_file_name(dialogue.dialogue_id)}"
    stems: list[str] = []
    for place, turn in enumerate(dialogue.turns):
        stem = f"{folder}/{_file_name(turn.utterance_id)}"
        stems.append(stem if stem not in stems else f"{stem}-{place}")
    return stems


def _ahead(pool: ThreadPoolExecutor, limit: int, work: Callable, items: Iterable) -> Iterator:
    """Yield (item, work(*item)) in order, with at most `limit` items in flight."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(work, *item)))
        if len(waiting) > limit:
            first, result = waiting.popleft()
            yield first, result.result()
    while waiting:
        first, result = waiting.popleft()
        yield first, result.result()


class _Writer:
    """Write shards to OUT/.work. `parts` maps the fingerprints of finished shards to their parts of the report."""

    def __init__(self, corpus: str, out: Path, embed: bool, num_workers: int, pool: ThreadPoolExecutor, bar: tqdm):
        self.corpus, self.embed, self.pool, self.bar = corpus, embed, pool, bar
        self.limit = 4 * max(1, num_workers)
        self.work, self.media = out / ".work", out / "media"
        self.parts = _finished(out)
        self.new_cuts: dict[str, str] = {}
        self.cuts = {} if embed else _read_cuts(self.media, self.work)
        self.clips = _Clips(self.work / "media" if embed else self.media, embed, self.cuts)

    def write(self, shard: _Shard, fingerprint: str) -> dict:
        """Write a shard, or reuse the shard of an earlier run. Returns its part of the report."""
        if fingerprint in self.parts:
            self.bar.update(shard.turns)
            return self.parts[fingerprint]
        self.work.mkdir(parents=True, exist_ok=True)
        counts = {"rows": 0, "dialogues": 0, "with_audio": 0, "with_video": 0, "emotions": {}}
        part = {"split": shard.split, "fingerprint": fingerprint, "counts": counts, **{name: [] for name in LISTS}}
        path = self.work / f"{fingerprint}.part"
        part["digest"] = part["size"] = None
        if write_rows(self._rows(shard, part), path):
            part["digest"], part["size"] = file_digest(path), path.stat().st_size
            os.replace(path, self.work / f"{fingerprint}.parquet")
        replace_file(self.work / f"{fingerprint}.json", to_json(part), self.work)
        return part

    def _rows(self, shard: _Shard, part: dict) -> Iterator[dict]:
        counts = part["counts"]
        items = (
            (dialogue.dialogue_id, turn, stem)
            for dialogue in shard.dialogues
            for turn, stem in zip(dialogue.turns, _stems(dialogue), strict=True)
        )

        def find(_, turn: Turn, stem: str) -> _Found:
            return self.clips.find(turn, stem, shard.stats)

        before, number = None, 0
        for (dialogue_id, turn, _), found in _ahead(self.pool, self.limit, find, items):
            self.bar.update()
            if dialogue_id != before:
                before, number = dialogue_id, 0
            for name, reason in found.notes:
                part[name].append({"item": turn.where, "reason": reason})
            if any(name == "left_out" for name, _ in found.notes):
                continue
            yield {
                "corpus": self.corpus,
                "split": shard.split,
                "dialogue_id": dialogue_id,
                "turn": number,
                "utterance_id": turn.utterance_id,
                "speaker": turn.speaker,
                "text": turn.text,
                "emotion": turn.emotion,
                "audio": self._media(found.audio),
                "video": self._media(found.video),
                "start": turn.start,
                "end": turn.end,
            }
            counts["rows"] += 1
            counts["dialogues"] += number == 0
            counts["with_audio"] += found.audio is not None
            counts["with_video"] += found.video is not None
            emotion = turn.emotion or "none"
            counts["emotions"][emotion] = counts["emotions"].get(emotion, 0) + 1
            number += 1

    def _media(self, chosen: _Chosen | None) -> dict | None:
        if chosen is None:
            return None
        value = media_struct(chosen.path, chosen.name, self.embed)
        if chosen.cut_key is not None and self.embed:
            chosen.path.unlink()
        elif chosen.cut_key is not None and self.cuts.get(chosen.name) != chosen.cut_key:
            self.cuts[chosen.name] = chosen.cut_key
            with open(self.work / "cuts.jsonl", "a", encoding="utf-8") as file:
                # The previous line may be incomplete if a run was killed while writing it.
                file.write("\n" + json.dumps([chosen.name, chosen.cut_key]) + "\n")
        return value


# Files of earlier runs -----------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _locate(out: Path, shards: dict[str, Path], part: dict) -> Path | None:
    """The parquet file of a part, in .work or already published; None if there is no such file."""
    for path in (out / ".work" / f"{part['fingerprint']}.parquet", shards.get(part["digest"])):
        if path is not None and path.is_file() and path.stat().st_size == part["size"]:
            return path
    return None


def _finished(out: Path) -> dict[str, dict]:
    """The parts of earlier runs whose parquet file still exists: fingerprint -> part."""
    shards = find_shards(out / "data")
    parts = list(_read_json(out / STATE_FILE).get("shards", []))
    parts += [part for part in map(_read_json, sorted((out / ".work").glob("*.json"))) if "fingerprint" in part]
    return {
        part["fingerprint"]: part for part in parts if part["digest"] is None or _locate(out, shards, part) is not None
    }


def _read_cuts(media: Path, work: Path) -> dict[str, str]:
    """Read which clips earlier runs have cut: path in `media` -> fingerprint of the cut."""
    cuts = dict(_read_json(media / "cuts.json"))
    if (work / "cuts.jsonl").is_file():
        for line in (work / "cuts.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                name, key = json.loads(line)
                cuts[name] = key
            except ValueError:
                continue
    return cuts


def _tidy(out: Path, embed: bool) -> None:
    """Remove the temporary files of runs; folders with these names that no run created stay."""
    work, media, unpacked = out / ".work", out / "media", out / "unpacked"
    own_media = (media / "cuts.json").is_file() or (work / "cuts.jsonl").is_file()
    own_unpacked = any(unpacked.rglob(".*.unpacked")) or not any(unpacked.rglob("*"))
    for folder, is_old in ((media, embed and own_media), (unpacked, embed and own_unpacked), (work, True)):
        if is_old and folder.exists():
            shutil.rmtree(folder)


# Preparing a corpus --------------------------------------------------------------------------------------------------


def unchanged(out: Path, source: str) -> dict | None:
    """The report.json of an earlier run with the same `source`, or None unless all files of that run still exist."""
    state, report = _read_json(out / STATE_FILE), _read_json(out / "report.json")
    shards = find_shards(out / "data")
    whole = all(part["digest"] is None or _locate(out, shards, part) for part in state.get("shards", []))
    if state.get("source") != source or not whole or not (out / "README.md").is_file():
        return None
    if state.get("report") != hashlib.sha256((out / "report.json").read_bytes()).hexdigest():
        return None
    _tidy(out, embed=True)
    return report


def say_unchanged(out: Path) -> None:
    """Print that the output is up to date."""
    tqdm.write(f"{out}: the output is up to date; nothing was done.", file=sys.stderr)


def prepare(
    about: CorpusInfo,
    dialogues: Iterable[Dialogue],
    out: str | os.PathLike,
    report: Report,
    *,
    embed: bool = False,
    num_workers: int = 1,
    progress: bool = True,
    options: dict | None = None,
    source: str | None = None,
) -> dict:
    """
    Write a prepared corpus: OUT/data/*.parquet, README.md and report.json. `datasets.load_dataset(OUT)` reads it.

    A run that was killed resumes where it stopped, with the same result. A run on input that is already prepared opens
    no clip and writes nothing. Files of an earlier run on other input are replaced; other files in OUT stay.

    Args:
        about: facts about the corpus, for the card.
        dialogues: dialogues from an adapter; read once, with one shard per split in memory.
        out: the folder OUT.
        report: filled by the adapter while `dialogues` is read; entries on the clips are added.
        embed: if True, the parquet files contain the media, and the files that runs left in OUT/unpacked and OUT/media
            are removed; if False, they contain absolute paths, and cut clips are in OUT/media.
        num_workers: threads that open and cut clips.
        progress: whether to show a progress bar.
        options: the chosen options, for the report.
        source: fingerprint of the raw corpus, stored for `unchanged`.

    Returns:
        The content of report.json. If its `rows` is 0, no other file is written.

    Raises:
        RuntimeError: if the number of rows that the adapter found is not the number written plus the number left out.
        ValueError: if the adapter gives a dialogue twice, or an emotion outside the seven.
    """
    out = Path(out)
    options = {**(options or {}), "embed": embed}
    data, parts = out / "data", []
    # Threads are enough: FFmpeg releases the GIL.
    with (
        ThreadPoolExecutor(max(1, num_workers)) as pool,
        tqdm(desc=f"Preparing {about.name}", unit=" turns", disable=not progress) as bar,
    ):
        writer = _Writer(about.name, out, embed, num_workers, pool, bar)
        for shard in _shards(dialogues, report, embed):
            parts.append(writer.write(shard, shard.fingerprint(about.name, embed, options)))

    splits: dict[str, dict] = {}
    for part in parts:
        for name in LISTS:
            getattr(report, name).extend(part[name])
        if part["counts"]["rows"]:
            add_counts(splits.setdefault(part["split"], {}), part["counts"])
    splits = {name: splits[name] for name in sorted_splits(splits)}
    for counts in splits.values():
        counts["emotions"] = dict(sorted(counts["emotions"].items()))
    rows = sum(counts["rows"] for counts in splits.values())
    if report.found != rows + len(report.left_out):
        raise RuntimeError(
            f"{about.name}: {report.found} rows were found, but {rows} written and {len(report.left_out)} left out: "
            "the adapter lost or duplicated rows. Nothing was published."
        )
    content = {
        "corpus": report.corpus,
        "found": report.found,
        "rows": rows,
        "options": options,
        "splits": splits,
        "published": beside_published(about, splits),
        **{name: getattr(report, name) for name in (*LISTS, "ignored")},
    }
    content = json.loads(to_json(content))
    changed = _publish(about, out, data, content, parts, writer.cuts, embed, source)
    _tidy(out, embed)
    if progress and not changed:
        say_unchanged(out)
    return content


def _publish(
    about: CorpusInfo,
    out: Path,
    data: Path,
    content: dict,
    parts: list[dict],
    cuts: dict[str, str],
    embed: bool,
    source: str | None,
) -> bool:
    """Move all output files to their final names. Returns whether any file changed."""
    work, text = out / ".work", to_json(content)
    out.mkdir(parents=True, exist_ok=True)
    if not content["rows"]:
        return replace_file(out / "report.json", text, work)
    data.mkdir(exist_ok=True)
    shards = find_shards(data)
    files: dict[str, list[tuple[Path, str]]] = {}
    for part in parts:
        if part["digest"] is not None:
            files.setdefault(part["split"], []).append((_locate(out, shards, part), part["digest"]))
    names = publish_shards(data, files)
    state = {"source": source, "report": hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()}
    changed = [
        replace_file(out / "README.md", corpus_card(about, content, names, embed), work),
        replace_file(out / "report.json", text, work),
        replace_file(out / STATE_FILE, to_json({**state, "shards": parts}), work),
    ]
    if cuts:
        changed.append(replace_file(out / "media" / "cuts.json", to_json(dict(sorted(cuts.items()))), work))
    remove_other_shards(data, names)
    return any(changed)

"""`prepare_corpus`: read a corpus with its adapter and write it with the pipeline."""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import asdict
from pathlib import Path

from ..files import held_folder
from .clip_digests import file_state
from .corpora.base import LayoutError, Options, Report
from .pipeline import prepare, say_unchanged, unchanged
from .schema import parse_emotion

OWN_FOLDERS = ("data", "media", "unpacked", ".work")  # folders in OUT that are written and removed here
CORPORA = (
    *("meld", "iemocap", "multidialog", "topical-chat", "empathetic-dialogues", "avamerg", "ravdess", "crema-d"),
    "folder",
)


def _tree_fingerprint(raw: Path, options: dict) -> str:
    """Fingerprint of the name, size and times of every file below `raw`, of the options, and of this package's code."""
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())

    def add(path: str) -> None:
        try:
            line = f"{os.path.abspath(path)} {file_state(path)}\n"
        except OSError:
            line = f"{path} is gone\n"
        digest.update(os.fsencode(line))

    if raw.is_file():
        add(str(raw))
    for folder, folders, files in os.walk(raw, followlinks=True):
        folders.sort()
        for name in sorted(files):
            add(os.path.join(folder, name))
    return digest.hexdigest()


def prepare_corpus(
    name: str,
    raw: str | os.PathLike,
    out: str | os.PathLike,
    *,
    embed: bool = False,
    num_workers: int = 1,
    progress: bool = True,
    split_seed: int = 0,
    emotion_map: dict[str, str | None] | None = None,
    keep_calm: bool = False,
    crowd_labels: bool = False,
    crop: bool = True,
    video_pattern: str | None = None,
    text_only: bool = False,
) -> dict:
    """
    Convert a downloaded corpus to the project's schema and write it to the folder `out`.

    `datasets.load_dataset(out)` reads the result. A run that was killed resumes where it stopped; a run on unchanged
    input does nothing.

    Args:
        name: one of `CORPORA`; folder: your own recordings.
        raw: the folder of the corpus.
        out: the folder to write to.
        embed: if True, the parquet files contain the media; if False, they contain absolute paths to the media files,
            which must stay in place.
        num_workers: threads that open and cut clips.
        progress: whether to show a progress bar.
        split_seed: seed of the splits, for a corpus without published splits.
        emotion_map: maps the corpus's labels to emotions, for example {"fru": "angry", "calm": None}; None drops a
            label.
        keep_calm, crowd_labels, crop, video_pattern, text_only: options of single corpora, see `Options`.

    Returns:
        The content of OUT/report.json: `found`, `rows`, `options`, `splits`, `published`, `left_out`, `repaired`,
        `without_media`, `ignored`.

    Raises:
        FolderInUseError: if another run writes to `out`.
        FileNotFoundError: if `raw` or a required file in `raw` does not exist.
        LayoutError: if `raw` does not have the layout of the corpus; if `out` is `raw` or would be read as a part of
            `raw`; if `raw` is in a folder of `out` that this function writes and removes.
        ValueError: if `name` is unknown, or `emotion_map` maps to anything but the seven emotions or None.
    """
    if name not in CORPORA:
        raise ValueError(f'there is no corpus "{name}". Choose one of {", ".join(CORPORA)}.')
    raw, out = Path(raw), Path(out)
    if not raw.exists():
        raise FileNotFoundError(f"{raw}: there is no such folder. Give the folder that the corpus was downloaded to.")
    if raw.resolve() == out.resolve():
        what = "recordings" if name == "folder" else "corpus"
        raise LayoutError(f"{out} is the folder of the {what}. Choose another folder for the output.")
    for folder in OWN_FOLDERS:
        if raw.resolve().is_relative_to((out / folder).resolve()):
            raise LayoutError(
                f"{raw} is in {out / folder}, whose files are written and removed here. Choose another folder "
                "for the output, or move the recordings."
            )
    if name != "folder" and out.resolve().is_relative_to(raw.resolve()):
        raise LayoutError(f"{out} is in the folder of the corpus, {raw}. Choose an output folder outside of it.")
    adapter = importlib.import_module(f"empathic.data_prep.corpora.{name.replace('-', '_')}")
    options = Options(
        unpacked=out / "unpacked",
        split_seed=split_seed,
        emotion_map={label.strip().lower(): parse_emotion(target) for label, target in (emotion_map or {}).items()},
        keep_calm=keep_calm,
        crowd_labels=crowd_labels,
        crop=crop,
        video_pattern=video_pattern,
        text_only=text_only,
    )
    shown = {key: value for key, value in asdict(options).items() if key != "unpacked"}
    with held_folder(out, "empathic prepare"):
        source = None
        if embed and name != "folder":  # unpacked files are removed at the end: do not unpack again only to compare
            source = _tree_fingerprint(raw, shown)
            content = unchanged(out, source)
            if content is not None:
                if progress:
                    say_unchanged(out)
                return content
        report = Report(name)
        return prepare(
            adapter.ABOUT,
            adapter.read(raw, report, options),
            out,
            report,
            embed=embed,
            num_workers=num_workers,
            progress=progress,
            options=shown,
            source=source,
        )

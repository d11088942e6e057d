"""One call for every corpus: the adapter of its name, then the pipeline."""

from __future__ import annotations

import hashlib
import importlib
import os
from dataclasses import asdict
from pathlib import Path

from empathic.data_prep.corpus import LayoutError, Options, Report
from empathic.data_prep.pipeline import prepare, say_unchanged, unchanged
from empathic.data_prep.schema import parse_emotion

OWN_FOLDERS = ("data", "media", "unpacked", ".work")  # in OUT
CORPORA = ("meld", "iemocap", "multidialog", "ravdess", "crema-d", "folder")


def _tree_fingerprint(raw: Path, options: dict) -> str:
    """Of the name, size and time of every file below `raw`, of the options, and of the code that reads them."""
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())

    def add(path: str) -> None:
        try:
            found = os.stat(path)
            line = f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}\n"
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
) -> dict:
    """
    Brings a corpus, as it lies on disk after its download, to the project's schema, in OUT.

    `datasets.load_dataset(OUT)` reads it. A run that was killed goes on where it was; one on unchanged input does
    nothing.

    Args:
        name: meld, iemocap, multidialog, ravdess, crema-d or folder (your own recordings).
        raw: the folder of the corpus.
        out: the folder to write to.
        embed: True copies the media into the parquet files; else they hold absolute paths and need the files in place.
        num_workers: threads that open and cut clips.
        progress: whether to show a progress bar.
        split_seed: of the splits that a corpus does not publish.
        emotion_map: what its own labels mean, for example {"fru": "angry", "calm": None}; None drops a label.
        keep_calm, crowd_labels, crop, video_pattern: choices of single corpora, see `Options`.

    Returns:
        The content of OUT/report.json: `found`, `rows`, `options`, `splits`, `published`, `left_out`, `repaired`,
        `without_media`, `ignored`.

    Raises:
        FileNotFoundError: if `raw` or what it must hold is not there.
        LayoutError: if it is not laid out as the corpus is; if `out` is `raw` or lies where it would be read as part of
            it; if `raw` lies in a folder of `out` that this writes and removes.
        ValueError: if `name` is unknown, or `emotion_map` leads outside of the seven.
    """
    if name not in CORPORA:
        raise ValueError(f'there is no corpus "{name}". Choose one of {", ".join(CORPORA)}.')
    raw, out = Path(raw), Path(out)
    if not raw.exists():
        raise FileNotFoundError(f"{raw}: there is no such folder. Give the one that the corpus was downloaded to.")
    if raw.resolve() == out.resolve():
        what = "recordings" if name == "folder" else "corpus"
        raise LayoutError(f"{out}: is the folder of the {what}. Choose another folder for the output.")
    for folder in OWN_FOLDERS:
        if raw.resolve().is_relative_to((out / folder).resolve()):
            raise LayoutError(
                f"{raw}: lies in {out / folder}, whose files are written and removed here. Choose another folder for "
                "the output, or move the recordings."
            )
    if name != "folder" and out.resolve().is_relative_to(raw.resolve()):
        raise LayoutError(f"{out}: lies in the folder of the corpus, {raw}. Choose one outside of it for the output.")
    adapter = importlib.import_module(f"empathic.data_prep.{name.replace('-', '_')}")
    options = Options(
        unpacked=out / "unpacked",
        split_seed=split_seed,
        emotion_map={label.strip().lower(): parse_emotion(target) for label, target in (emotion_map or {}).items()},
        keep_calm=keep_calm,
        crowd_labels=crowd_labels,
        crop=crop,
        video_pattern=video_pattern,
    )
    shown = {key: value for key, value in asdict(options).items() if key != "unpacked"}
    source = None
    if embed and name != "folder":  # what was unpacked is gone again: not to be unpacked just to see that
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

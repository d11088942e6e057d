"""`empathic prepare`: convert a downloaded corpus into a data set."""

import argparse

from . import add_command
from .push import add_push_options, push_written

SHOWN = 3  # examples printed for each kind of entry
SHOWN_REASONS = 8  # kinds printed for each list


def _print_summary(report: dict, out: str) -> None:
    from ..data_prep.writer import grouped

    print(f"{report['rows']} turns are in {out}; {report['found']} rows were found.")
    for name, counts in report["splits"].items():
        labeled = counts["rows"] - counts["emotions"].get("none", 0)
        print(
            f"  {name}: {counts['rows']} turns in {counts['dialogues']} dialogues, {counts['with_audio']} with audio, "
            f"{counts['with_video']} with video, {labeled} with an emotion"
        )
    for entry in report["published"]["differences"]:
        print(f"differs from the published count: {entry['split']}: {entry['count']}: {entry['here']} here, "
              f"{entry['published']} published")  # fmt: skip
    for key in ("left_out", "without_media", "repaired", "ignored"):
        kinds = grouped(report[key])
        if kinds:
            print(f"{key.replace('_', ' ')}: {len(report[key])}")
        for kind, entries in kinds[:SHOWN_REASONS]:
            print(
                f"  {len(entries)} × {kind}" if len(entries) > 1 else f"  {entries[0]['item']}: {entries[0]['reason']}"
            )
            for entry in entries[:SHOWN] if len(entries) > 1 else ():
                print(f"    {entry['item']}: {entry['reason']}")
        if len(kinds) > SHOWN_REASONS:
            print(f"  and {sum(len(entries) for _, entries in kinds[SHOWN_REASONS:])} of other kinds")
    print(f"The full list is in {out}/report.json.")


def run(arguments) -> int:
    from ..data_prep.prepare import prepare_corpus

    report = prepare_corpus(
        arguments.corpus,
        arguments.raw,
        arguments.out,
        embed=arguments.embed or arguments.push_to_hub is not None,
        num_workers=arguments.num_workers,
        split_seed=arguments.split_seed,
        emotion_map=dict(arguments.emotion_map),
        keep_calm=arguments.keep_calm,
        crowd_labels=arguments.crowd_labels,
        crop=arguments.crop,
        video_pattern=arguments.video_pattern,
        text_only=arguments.text_only,
    )
    _print_summary(report, arguments.out)
    return push_written(arguments, arguments.out) if report["rows"] else 1


def _mapping(text: str) -> tuple[str, str | None]:
    """Parse a label mapping: `fru=angry` -> ("fru", "angry"); `calm=` -> ("calm", None)."""
    label, equals, emotion = text.partition("=")
    if not equals or not label.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not LABEL=EMOTION; write for example fru=angry, or calm= to drop calm"
        )
    return label, emotion.strip().lower() or None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; give a number from 1 up")
    return number


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "prepare",
        run,
        "convert a corpus, or a folder of recordings with a metadata.jsonl, into a data set",
        "empathic prepare folder recordings data/recordings --num_workers 2",
    )
    corpora = (
        *("meld", "iemocap", "multidialog", "topical-chat", "empathetic-dialogues", "avamerg", "ravdess", "crema-d"),
        "folder",
    )
    sub.add_argument("corpus", choices=corpora, help="layout of RAW; folder: your own recordings")
    sub.add_argument("raw", metavar="RAW", help="folder of the downloaded corpus")
    sub.add_argument("out", metavar="OUT", help="folder to write; `datasets.load_dataset(OUT)` reads it")
    sub.add_argument(
        "--embed", action="store_true", help="store the media bytes in the data set; implied by --push_to_hub"
    )
    sub.add_argument("--num_workers", type=_positive, default=1, help="threads that open and cut clips (%(default)s)")
    sub.add_argument("--split_seed", type=int, default=0, help="seed of the split if RAW gives no split (%(default)s)")
    sub.add_argument(
        "--emotion_map", type=_mapping, nargs="+", action="extend", default=[], metavar="LABEL=EMOTION",
        help="emotion for a label of the corpus, such as fru=angry; an empty EMOTION drops the label",
    )  # fmt: skip
    sub.add_argument(
        "--keep_calm", action="store_true", help="ravdess: count calm as neutral instead of leaving it out"
    )
    sub.add_argument(
        "--crowd_labels",
        action="store_true",
        help="crema-d: use the crowd's vote instead of the label in the file name",
    )
    sub.add_argument(
        "--crop", action=argparse.BooleanOptionalAction, default=True,
        help="iemocap: keep only the half of the frame that shows the speaker (default: --crop)",
    )  # fmt: skip
    sub.add_argument(
        "--video_pattern", metavar="PATH",
        help="multidialog: path of a turn's video inside RAW, with the fields {split} {conv_id} {n} {actor} {stem}",
    )  # fmt: skip
    sub.add_argument("--text_only", action="store_true", help="meld, avamerg: read the tables alone, without clips")
    add_push_options(sub)

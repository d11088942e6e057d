"""`empathic prepare`: a corpus as it was downloaded -> a data set."""

import argparse
import sys

from empathic.commands import add_command
from empathic.commands.push import add_push_options, push_written

SHOWN = 3  # examples of each kind of entry
KINDS = 8  # kinds of each list


def _print_summary(report: dict, out: str) -> None:
    from empathic.data_prep.writer import grouped

    print(f"{report['rows']} turns are in {out}; {report['found']} rows were found.")
    for name, counts in report["splits"].items():
        labelled = counts["rows"] - counts["emotions"].get("none", 0)
        print(
            f"  {name}: {counts['rows']} turns in {counts['dialogues']} dialogues, {counts['with_audio']} with audio, "
            f"{counts['with_video']} with video, {labelled} with an emotion"
        )
    for entry in report["published"]["differences"]:
        print(f"differs from what was published: {entry['split']}: {entry['count']}: {entry['here']} here, "
              f"{entry['published']} published")  # fmt: skip
    for key in ("left_out", "without_media", "repaired", "ignored"):
        kinds = grouped(report[key])
        if kinds:
            print(f"{key.replace('_', ' ')}: {len(report[key])}")
        for kind, entries in kinds[:KINDS]:
            print(
                f"  {len(entries)} × {kind}" if len(entries) > 1 else f"  {entries[0]['item']}: {entries[0]['reason']}"
            )
            for entry in entries[:SHOWN] if len(entries) > 1 else ():
                print(f"    {entry['item']}: {entry['reason']}")
        if len(kinds) > KINDS:
            print(f"  and {sum(len(entries) for _, entries in kinds[KINDS:])} of other kinds")
    print(f"{out}/report.json names all of it.")


def run(arguments) -> int:
    from empathic.data_prep.corpus import LayoutError
    from empathic.data_prep.prepare import prepare_corpus
    from empathic.data_prep.schema import SchemaError

    try:
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
        )
    except (FileNotFoundError, LayoutError, SchemaError) as error:
        print(f"empathic prepare: {error}", file=sys.stderr)
        return 1
    _print_summary(report, arguments.out)
    return push_written(arguments, arguments.out) if report["rows"] else 1


def _mapping(text: str) -> tuple[str, str | None]:
    """`fru=angry` -> ("fru", "angry"); `calm=` -> ("calm", None)."""
    label, equals, emotion = text.partition("=")
    if not equals or not label.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=EMOTION, such as fru=angry, or calm= to drop calm")
    return label, emotion.strip().lower() or None


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "prepare",
        run,
        "turn a corpus, or a folder of recordings with a metadata.jsonl, into a data set",
        "empathic prepare folder recordings data/recordings --num-workers 2",
    )
    corpora = ("meld", "iemocap", "multidialog", "ravdess", "crema-d", "folder")
    sub.add_argument("corpus", choices=corpora, help="layout of RAW; folder: your own recordings")
    sub.add_argument("raw", metavar="RAW", help="folder of the corpus as it was downloaded")
    sub.add_argument("out", metavar="OUT", help="folder to write; `datasets.load_dataset(OUT)` reads it")
    sub.add_argument("--embed", action="store_true", help="put the media's bytes into the data set; a push does")
    sub.add_argument("--num-workers", type=_positive, default=1, help="threads that open and cut clips (%(default)s)")
    sub.add_argument("--split-seed", type=int, default=0, help="decides the split where none is given (%(default)s)")
    sub.add_argument(
        "--emotion-map", type=_mapping, nargs="+", action="extend", default=[], metavar="LABEL=EMOTION",
        help="what the corpus's own labels mean, such as fru=angry; an empty EMOTION drops the label",
    )  # fmt: skip
    sub.add_argument("--keep-calm", action="store_true", help="ravdess: calm counts as neutral; else it is left out")
    sub.add_argument("--crowd-labels", action="store_true", help="crema-d: the crowd's vote, not the file name's label")
    sub.add_argument(
        "--crop", action=argparse.BooleanOptionalAction, default=True,
        help="iemocap: keep the half of the picture that shows the speaker (default: --crop)",
    )  # fmt: skip
    sub.add_argument(
        "--video-pattern", metavar="PATH",
        help="multidialog: path of a turn's video below RAW, with {split} {conv_id} {n} {actor} {stem} in it",
    )  # fmt: skip
    add_push_options(sub)

"""`empathic study`: the human evaluation."""

import sys
from pathlib import Path

from empathic.commands import add_command


def _failing(run):
    """The command, with a study's errors as one line."""

    def wrapped(arguments) -> int:
        from empathic.evaluation.study.replies import StudyError

        try:
            return run(arguments)
        except StudyError as error:
            print(f"empathic study: {error}", file=sys.stderr)
            return 1

    return wrapped


@_failing
def build(arguments) -> int:
    """Writes a study."""
    from empathic.evaluation.study.build import Exclusion, StudyOptions
    from empathic.evaluation.study.build import build as build_study

    options = StudyOptions(
        conversations=arguments.conversations or None,
        raters=arguments.raters,
        ratings=arguments.ratings,
        design=arguments.design,
        checks=arguments.checks,
        seed=arguments.seed,
        reference=arguments.reference,
        title=arguments.title,
        thanks=arguments.thanks,
        exclusion=Exclusion(**{name: value for name, value in _rules(arguments).items() if value is not None}),
    )
    key = build_study(arguments.replies, Path(arguments.out), options, arguments.static)
    for row in key["left_out"][:20]:
        print(f"left out: {row['id']}: {row['reason']}")
    if len(key["left_out"]) > 20:
        print(f"left out: {len(key['left_out']) - 20} more, see key.json")
    settings = key["settings"]
    print(
        f"{settings['conversations']} conversations, {len(key['systems'])} systems ({', '.join(key['systems'])}), "
        f"{settings['raters']} raters, {settings['ratings']} ratings of each reply, {settings['design']} raters."
    )
    if arguments.static:
        print(f"Each rater's page is in {arguments.out}/static, with the clips beside it.")
    print(f"{arguments.out}/key.json tells which reply is whose: keep it from the raters.")
    if not arguments.static:
        print(f"Open the study with `empathic study serve {arguments.out}`.")
    return 0


@_failing
def serve(arguments) -> int:
    """Serves a study."""
    from empathic.evaluation.study.server import serve as serve_study

    serve_study(Path(arguments.study), arguments.host, arguments.port)
    return 0


@_failing
def analyse(arguments) -> int:
    """Analyses a study."""
    import json

    from empathic.evaluation.study.analysis import analyse as analyse_study
    from empathic.evaluation.study.build import KEY, Exclusion
    from empathic.evaluation.study.report import text, write

    changed = {name: value for name, value in _rules(arguments).items() if value is not None}
    exclusion = None
    if changed and (Path(arguments.study) / KEY).is_file():
        stated = json.loads((Path(arguments.study) / KEY).read_text(encoding="utf-8"))["settings"]["exclusion"]
        exclusion = Exclusion(**{**stated, **changed})
    files = [Path(file) for file in arguments.answers] if arguments.answers else None
    result = analyse_study(
        Path(arguments.study), exclusion, files, arguments.resamples, arguments.confidence, arguments.seed
    )
    print(text(result))
    written = write(result, Path(arguments.out or arguments.study))
    print(f"All of it is in {written[0]} and {written[1]}.")
    return 0


def _rules(arguments) -> dict:
    return {
        "complete": arguments.min_complete,
        "failed_checks": arguments.max_failed_checks,
        "median_seconds": arguments.min_seconds,
        "played": arguments.min_played,
    }


def _add_rules(parser, default: str) -> None:
    rules = parser.add_argument_group("who is left out of the analysis", default)
    rules.add_argument("--min_complete", type=float, help="share of the answers that must be there (1)")
    rules.add_argument("--max_failed_checks", type=int, help="attention checks that may be failed (0)")
    rules.add_argument("--min_seconds", type=float, help="least median time for a reply (2)")
    rules.add_argument("--min_played", type=float, help="share of the clips that must have been played (0.5)")


def add(commands) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "study",
        None,
        "let people judge saved replies of several systems, blind",
        "empathic study build ours.jsonl theirs.jsonl --out study",
    )
    subs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    sub = add_command(
        subs,
        "build",
        build,
        "make a study of saved replies",
        "empathic study build ours.jsonl theirs.jsonl --out study --conversations 10 --raters 10",
    )
    sub.add_argument(
        "replies",
        nargs="+",
        metavar="REPLIES",
        help="JSONL files; a system is called as its file is, or give NAME=FILE",
    )
    sub.add_argument("--out", required=True, help="folder of the study, not there yet")
    sub.add_argument(
        "--conversations", type=int, default=10, help="how many are drawn, 0 for all (%(default)s, as in the paper)"
    )
    sub.add_argument("--raters", type=int, default=10, help="how many people judge (%(default)s, as in the paper)")
    sub.add_argument("--ratings", type=int, help="of each reply (as many as the raters allow)")
    sub.add_argument(
        "--design",
        choices=("within", "between"),
        default="within",
        help="whether a rater sees the replies of all systems to a conversation, one after the other, as in the paper, "
        "or one of them (%(default)s)",
    )
    sub.add_argument("--checks", type=int, default=2, help="attention checks of each rater (%(default)s)")
    sub.add_argument("--reference", action="store_true", help="let the true replies be rated too")
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn, and of all orders (%(default)s)")
    sub.add_argument("--static", action="store_true", help="also write pages that need no server")
    sub.add_argument("--title", default="Which reply fits?", help="of the page (%(default)s)")
    sub.add_argument(
        "--thanks",
        default="That was the last reply. Thank you!",
        help="last words of the page, such as a code of completion (%(default)s)",
    )
    _add_rules(sub, "stated with the study, before anybody answers")

    sub = add_command(
        subs,
        "serve",
        serve,
        "open a study: prints the raters' links and saves their answers",
        "empathic study serve study --port 8000",
    )
    sub.add_argument("study", metavar="STUDY", help="what `build` wrote")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="where it listens (%(default)s: this machine only); on the internet, put a server with https before it",
    )
    sub.add_argument("--port", type=int, default=8000, help="(%(default)s)")

    sub = add_command(
        subs,
        "analyse",
        analyse,
        "tell what the answers say: scores, agreement, preferences, who is left out",
        "empathic study analyse study",
    )
    sub.add_argument("study", metavar="STUDY", help="what `build` wrote")
    sub.add_argument("--answers", nargs="+", metavar="FILE", help="files that static pages gave")
    sub.add_argument("--out", help="folder of analysis.md and analysis.json (STUDY)")
    sub.add_argument("--resamples", type=int, default=10000, help="of the bootstrap (%(default)s)")
    sub.add_argument("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    _add_rules(sub, "instead of those that were stated with the study; the report says that they were changed")

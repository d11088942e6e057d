"""`empathic study`: run the human evaluation."""

from pathlib import Path

from . import add_command


def build(arguments) -> int:
    """Write a study."""
    from ..evaluation.study.build import Exclusion, StudyOptions
    from ..evaluation.study.build import build as build_study

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
        f"{settings['raters']} raters, {settings['ratings']} ratings of each reply, {settings['design']}-rater design."
    )
    if arguments.static:
        print(f"Each rater's page is in {arguments.out}/static, with the clips beside it.")
    print(f"{arguments.out}/key.json says which system gave which reply: do not show it to the raters.")
    if not arguments.static:
        print(f"Open the study with `empathic study serve {arguments.out}`.")
    return 0


def serve(arguments) -> int:
    """Serve a study."""
    from ..evaluation.study.server import serve as serve_study

    serve_study(Path(arguments.study), arguments.host, arguments.port)
    return 0


def analyze(arguments) -> int:
    """Analyze a study."""
    import json

    from ..evaluation.study.analysis import analyze as analyze_study
    from ..evaluation.study.build import KEY, Exclusion
    from ..evaluation.study.report import text, write

    changed = {name: value for name, value in _rules(arguments).items() if value is not None}
    exclusion = None
    if changed and (Path(arguments.study) / KEY).is_file():
        stated = json.loads((Path(arguments.study) / KEY).read_text(encoding="utf-8"))["settings"]["exclusion"]
        exclusion = Exclusion(**{**stated, **changed})
    files = [Path(file) for file in arguments.answers] if arguments.answers else None
    result = analyze_study(
        Path(arguments.study), exclusion, files, arguments.resamples, arguments.confidence, arguments.seed
    )
    print(text(result))
    written = write(result, Path(arguments.out or arguments.study))
    print(f"All results are in {written[0]} and {written[1]}.")
    return 0


def _rules(arguments) -> dict:
    return {
        "complete": arguments.min_complete,
        "failed_checks": arguments.max_failed_checks,
        "median_seconds": arguments.min_seconds,
        "played": arguments.min_played,
    }


def _add_rules(parser, default: str) -> None:
    rules = parser.add_argument_group("rules for excluding raters from the analysis", default)
    rules.add_argument("--min_complete", type=float, help="minimum share of replies that a rater has rated (1)")
    rules.add_argument("--max_failed_checks", type=int, help="maximum number of failed attention checks (0)")
    rules.add_argument("--min_seconds", type=float, help="minimum median time per reply, in seconds (2)")
    rules.add_argument("--min_played", type=float, help="minimum share of clips that a rater has played (0.5)")


def add(commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "study",
        None,
        "let people rate the saved replies of several systems, blind",
        "empathic study build ours.jsonl theirs.jsonl --out study",
    )
    subs = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    sub = add_command(
        subs,
        "build",
        build,
        "create a study from saved replies",
        "empathic study build ours.jsonl theirs.jsonl --out study --conversations 10 --raters 10",
    )
    sub.add_argument(
        "replies",
        nargs="+",
        metavar="REPLIES",
        help="JSONL files; NAME=FILE names the system (default: the name of the file)",
    )
    sub.add_argument("--out", required=True, help="folder of the study; it must not exist yet")
    sub.add_argument(
        "--conversations",
        type=int,
        default=10,
        help="number of conversations to draw, 0 for all (%(default)s, as in the paper)",
    )
    sub.add_argument("--raters", type=int, default=10, help="number of raters (%(default)s, as in the paper)")
    sub.add_argument("--ratings", type=int, help="number of ratings per reply (default: as many as the raters allow)")
    sub.add_argument(
        "--design",
        choices=("within", "between"),
        default="within",
        help="within: a rater sees the replies of all systems to a conversation, one after the other, as in the paper; "
        "between: a rater sees the reply of one system (%(default)s)",
    )
    sub.add_argument("--checks", type=int, default=2, help="attention checks per rater (%(default)s)")
    sub.add_argument("--reference", action="store_true", help="also let the true replies be rated")
    sub.add_argument("--seed", type=int, default=0, help="seed of the draw and of all orders (%(default)s)")
    sub.add_argument("--static", action="store_true", help="also write pages that need no server")
    sub.add_argument("--title", default="Which reply fits?", help="title of the page (%(default)s)")
    sub.add_argument(
        "--thanks",
        default="That was the last reply. Thank you!",
        help="text at the end of the page, such as a completion code (%(default)s)",
    )
    _add_rules(sub, "the rules are fixed with the study, before anyone answers")

    sub = add_command(
        subs,
        "serve",
        serve,
        "open a study: print the raters' links and save their answers",
        "empathic study serve study --port 8000",
    )
    sub.add_argument("study", metavar="STUDY", help="output folder of `build`")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (%(default)s: this machine only); on the internet, put an HTTPS proxy in front",
    )
    sub.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")

    sub = add_command(
        subs,
        "analyze",
        analyze,
        "analyze the answers: scores, agreement, preferences, excluded raters",
        "empathic study analyze study",
        aliases=["analyse"],  # the former name
    )
    sub.add_argument("study", metavar="STUDY", help="output folder of `build`")
    sub.add_argument("--answers", nargs="+", metavar="FILE", help="answer files from static pages")
    sub.add_argument("--out", help="folder for analysis.md and analysis.json (default: STUDY)")
    sub.add_argument("--resamples", type=int, default=10000, help="bootstrap resamples (%(default)s)")
    sub.add_argument("--confidence", type=float, default=0.95, help="confidence level of the intervals (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (%(default)s)")
    _add_rules(sub, "these replace the rules fixed with the study; the report says that they were changed")

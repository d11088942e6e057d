"""`empathic evaluate`: the paper's tables, one subcommand each."""

import sys

from empathic.benchmarks.efficiency_options import add_options, positive
from empathic.commands import add_command


def reconstruction(arguments) -> int:
    """Table 8."""
    from empathic.evaluation.reconstruction import ReconstructionOptions, run

    try:
        options = ReconstructionOptions(
            utterances=arguments.utterances,
            split=arguments.split,
            max_runs=arguments.max_runs,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            device=arguments.device,
            bertscore_model=None if arguments.bertscore_model == "none" else arguments.bertscore_model,
            bertscore_layer=arguments.bertscore_layer,
            examples=arguments.examples,
        )
        results = run(arguments.model, arguments.data, arguments.output, options)
    except (OSError, ValueError) as error:
        print(f"empathic evaluate reconstruction: {error}", file=sys.stderr)
        return 1
    for length, row in results["scores"].items():
        values = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        print(f"{length} at once ({results['runs'][length]} runs): {values}")
    print(f"BERTScore: {results['bertscore']}. All of it is in {arguments.output}.")
    return 0


def efficiency(arguments) -> int:
    """Table 3."""
    from empathic.benchmarks.efficiency import run

    run(arguments)
    return 0


def add_reconstruction(commands) -> None:
    """Adds the subcommand."""
    sub = add_command(
        commands,
        "reconstruction",
        reconstruction,
        "rebuild utterances of held-out conversations from their memory vectors (paper's Table 8)",
        "empathic evaluate reconstruction runs/quickstart/memory_multi runs/quickstart/data --utterances 1 5",
    )
    sub.add_argument("model", metavar="MODEL", help="whole checkpoint, stage's folder or Hub id")
    sub.add_argument("data", metavar="DATA", help="prepared data set, folder or Hub id")
    sub.add_argument("--output", default="runs/evaluation", metavar="FOLDER", help="folder to write (%(default)s)")
    sub.add_argument(
        "--utterances", type=positive, nargs="+", default=[1, 5, 10, 20], metavar="N",
        help="how many are rebuilt at once (default: 1 5 10 20)",
    )  # fmt: skip
    sub.add_argument("--split", default="test", help="of DATA, one that was not trained on (%(default)s)")
    sub.add_argument("--max_runs", type=positive, default=200, metavar="N", help="runs of each at most (%(default)s)")
    sub.add_argument("--batch_size", type=positive, default=32, help="runs at once (%(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="draws the runs (%(default)s)")
    sub.add_argument("--device", help="such as cpu or cuda:0; a GPU if there is one by default")
    sub.add_argument(
        "--bertscore_model", default="roberta-large", metavar="ID",
        help="Hub id or folder; none: without BERTScore (%(default)s)",
    )  # fmt: skip
    sub.add_argument("--bertscore_layer", type=positive, metavar="N", help="needed for a model in a folder")
    sub.add_argument("--examples", type=int, default=3, metavar="N", help="of each in the report (%(default)s)")


def add_efficiency(commands) -> None:
    """Adds the subcommand."""
    sub = add_command(
        commands,
        "efficiency",
        efficiency,
        "measure what a conversation's history costs (paper's Table 3)",
        "empathic evaluate efficiency --preset tiny --turns 1 10 200",
    )
    add_options(sub)


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "evaluate",
        None,
        "compute a table of the paper",
        "empathic evaluate efficiency --preset tiny --paper",
    )
    tables = sub.add_subparsers(dest="table", required=True, metavar="TABLE")
    for add_one in (add_reconstruction, add_efficiency):
        add_one(tables)

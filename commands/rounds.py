"""`empathic rounds`: on-policy rounds of EPO, each on pairs that the model of the round before has written."""

import argparse
from pathlib import Path

from ..composition_empathic import STAGE_FILE
from ..data_prep.counter.options import add_options, as_arguments
from ..processes import launch
from . import add_command


def run(arguments, rest: list[str]) -> int:
    if arguments.generator is not None:
        raise ValueError(
            f"--generator is {arguments.generator}, but in a round the model itself writes the replies. Give --model."
        )
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; give a number from 1 up.")
    # By default, the YAML file says how many rejected replies are used.
    negatives = [] if arguments.negatives == "lowest" else ["--negatives", arguments.negatives]
    model = arguments.model
    for number in range(1, arguments.rounds + 1):
        pairs, trained = (Path(arguments.out, f"round-{number}", name) for name in ("pairs", "model"))
        print(f"round {number} of {arguments.rounds}: {model} writes {pairs} and becomes {trained}", flush=True)
        options = argparse.Namespace(**{**vars(arguments), "model": model, "out": str(pairs), "use_adapter": True})
        status = launch("empathic.data_prep.counter.build", as_arguments(options), arguments.accelerate_config)
        if status == 0 and not _is_trained(trained, pairs):
            line = ["--config", arguments.config, "--model_name_or_path", model, "--dataset_name", str(pairs)]
            line += ["--output_dir", str(trained), *negatives, *rest]
            status = launch("empathic.trainers.train", line, arguments.accelerate_config)
        if status != 0:
            return status
        model = str(trained)
    return 0


def _is_trained(trained: Path, pairs: Path) -> bool:
    """Whether a model was trained on these pairs; complete pairs are not written again."""
    stage = trained / STAGE_FILE
    return stage.exists() and stage.stat().st_mtime_ns >= (pairs / "report.json").stat().st_mtime_ns


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "rounds",
        run,
        "on-policy rounds of EPO: `counter --use_adapter`, then `train`; options unknown here are those of `train`",
        "empathic rounds --config recipes/tiny/epo.yaml --model runs/epo --data data/meld --out runs/rounds --rounds 2",
    )
    sub.set_defaults(takes_rest=True)
    sub.add_argument("--config", required=True, help="YAML file of stage epo")
    sub.add_argument("--rounds", type=int, default=1, help="number of rounds (%(default)s)")
    sub.add_argument("--accelerate_config", help="configuration file for `accelerate launch`")
    add_options(sub)

"""`empathic counter`: counter-emotional preference pairs."""

from ..data_prep.counter.options import add_options, as_arguments
from ..processes import launch
from . import add_command
from .push import add_push_options, push_written


def run(arguments) -> int:
    if arguments.accelerate_config is not None:
        module = "empathic.data_prep.counter.build"
        status = launch(module, as_arguments(arguments), arguments.accelerate_config)
    else:
        from ..data_prep.counter import build as counter

        status = counter.run(arguments)
    return push_written(arguments, arguments.out) if status == 0 else status


def add(commands) -> None:
    """Add the command."""
    sub = add_command(
        commands,
        "counter",
        run,
        "write counter-emotional replies and select preference pairs (paper's Sec. 3.3)",
        "empathic counter --model runs/dialogue --data data/meld --out data/meld-pairs",
    )
    sub.add_argument("--accelerate_config", help="configuration file for `accelerate launch`, to use several processes")
    add_options(sub)
    add_push_options(sub)

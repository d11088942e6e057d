"""`empathic counter`: counter-emotional preference pairs."""

import subprocess
import sys

from empathic.commands import add_command
from empathic.commands.push import add_push_options, push_written
from empathic.data_prep.counter_options import add_options, as_arguments


def run(arguments) -> int:
    if arguments.accelerate_config is not None:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", arguments.accelerate_config]
        status = subprocess.call([*launch, "-m", "empathic.data_prep.counter", *as_arguments(arguments)])
    else:
        from empathic.data_prep import counter

        status = counter.run(arguments)
    return push_written(arguments, arguments.out) if status == 0 else status


def add(commands) -> None:
    """Adds the command."""
    sub = add_command(
        commands,
        "counter",
        run,
        "write counter-emotional replies and select preference pairs (paper's Sec. 3.3)",
        "empathic counter --model runs/dialogue --data data/meld --out data/meld-pairs",
    )
    sub.add_argument("--accelerate_config", help="configuration of `accelerate launch`, to use several processes")
    add_options(sub)
    add_push_options(sub)

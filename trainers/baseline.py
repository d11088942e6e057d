"""
Fine-tunes a baseline: the public name of `empathic.baselines.train`.

    accelerate launch -m empathic.trainers.baseline --config recipes/baselines/chat.yaml
"""

from ..baselines.train import BaselineConfig, main
from ..errors import run_program
from ..processes import leave

__all__ = ["BaselineConfig", "main"]


def program() -> None:
    """Fine-tune a baseline in a process of its own."""
    main()


if __name__ == "__main__":
    leave(run_program("empathic.trainers.baseline", program))

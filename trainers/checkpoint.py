"""The old place of `empathic.trainers.checkpoints.stage_folder`, kept for one release."""

from .checkpoints.stage_folder import *  # noqa: F403

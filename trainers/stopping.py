"""A training that a signal stops at the end of a step, with a checkpoint."""

from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..processes import Stopped, StopRequest, outlive_signals

NOTICE = "The training stops after this step. Once more to stop at once."


def keep_workers(loader: DataLoader) -> DataLoader:
    """Let the workers of a data loader live until its process has saved; returns the loader."""
    own = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
    own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
    return loader


def _start_worker(init, worker: int) -> None:
    if init is not None:
        init(worker)
    outlive_signals()


class StopWhenAsked(TrainerCallback):
    """
    Ends a training with `Stopped` at the end of the step in which a signal came, after saving a checkpoint unless
    `save_strategy` is `no`.

    Args:
        request: filled by `processes.stop_requests`.
        device: device for agreeing with the other ranks, each of which gets the signal at another moment.
    """

    def __init__(self, request: StopRequest, device: torch.device):
        self.request, self.device, self.stopping = request, device, False

    def _anyone_is_asked(self) -> int:
        """Return the largest signal number on any rank; 0 if no rank was asked."""
        signum = self.request.signum or 0
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            value = torch.tensor(signum, device=self.device)
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
            signum = int(value)
        return signum

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if train_dataloader is not None:
            keep_workers(train_dataloader)

    def on_step_end(self, args, state, control, **kwargs):
        signum = self._anyone_is_asked()
        if not signum:
            return
        self.request.signum, self.stopping = signum, True
        if args.save_strategy == SaveStrategy.NO:
            raise Stopped(signum, f"stopped by a signal at step {state.global_step}; save_strategy is no.")
        control.should_save, control.should_evaluate = True, False

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            raise Stopped(
                self.request.signum,
                f"stopped by a signal at step {state.global_step}; saved {args.output_dir}/{PREFIX_CHECKPOINT_DIR}-"
                f"{state.global_step}. To go on, add --resume_from_checkpoint auto.",
            )

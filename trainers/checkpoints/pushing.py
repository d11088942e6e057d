"""Pushing a stage to the Hub while it trains and when it is done."""

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ...hub.client import PushError, push_files
from ...hub.model_card import hub_id
from ...hub.models import local_bases, push_model

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # the folder in the repository, named as in transformers


def check_base(base: str | dict, hub_base: str | None) -> None:
    """
    Check that a pushed stage could be loaded from the Hub.

    Raises:
        ValueError: if the base is a local folder and `hub_base` is not given, or `hub_base` is not a Hub id.
    """
    local = local_bases(base)
    if hub_base is not None and hub_id(hub_base) is None:
        raise ValueError(f"--hub_base {hub_base} is not a Hub id: give the id of the base on the Hub.")
    if local and hub_base is None:
        raise ValueError(
            f"--push_to_hub: this stage starts from {local[0]}, a local folder, so the pushed stage could not be "
            "loaded. Push this base first and give its id with --hub_base ID; or train without --push_to_hub, merge "
            "the stage into one model with `empathic merge`, and push this model with `empathic push`."
        )


class StagePusher:
    """
    Pushes a stage to the Hub while it trains and when it is done; each push is a commit as made by `empathic push`.

    `hub_strategy`: `end` pushes once; `every_save` also pushes the model of each checkpoint; `checkpoint` also the
    whole last checkpoint, in `last-checkpoint/`; `all_checkpoints` each checkpoint in its own folder. Checkpoints are
    pushed in the background, and training continues if a push fails. Only the main process pushes.

    Args:
        trainer: the `StageSaving` trainer that owns this object.
        hub_base: the Hub id of the stage's base, if the stage started from a local folder.
    """

    def __init__(self, trainer, hub_base: str | None = None):
        self.trainer, self.hub_base = weakref.proxy(trainer), hub_base
        self.repo_id = trainer.args.hub_model_id or Path(trainer.args.output_dir).resolve().name
        self._pushes: dict[str, Future] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="push")  # one push at a time

    def start(self) -> None:
        """
        Create the repository, so that problems with the push are found before training.

        Raises:
            ValueError: see `check_base`.
            PushError: if the token, id or repository cannot be used, or the base is not on the Hub.
        """
        own, args = self.trainer.stage_record.base, self.trainer.args
        check_base(own, self.hub_base)
        if not self.trainer.is_world_process_zero():
            return
        options = self._options()
        base = options.pop("base") or (own if isinstance(own, str) else None)
        needs = () if base is None else (base,)
        push_files({}, {}, self.repo_id, repo_type="model", commit_message="Training starts", needs=needs, **options)
        if "/" not in self.repo_id:
            self.repo_id = f"{HfApi(token=args.hub_token).whoami()['name']}/{self.repo_id}"

    def _options(self) -> dict:
        args = self.trainer.args
        return {
            "private": args.hub_private_repo is not False,
            "base": self.hub_base,
            "token": args.hub_token,
            "revision": args.hub_revision,
        }

    def _checkpoints(self, folders: list[Path]) -> dict[str, Path]:
        """Select the complete checkpoints that the strategy pushes, by their folder in the repository, newest last."""
        strategy = self.trainer.args.hub_strategy
        if strategy == HubStrategy.ALL_CHECKPOINTS:
            return {folder.name: folder for folder in folders}
        return {LAST_CHECKPOINT: folders[-1]} if strategy == HubStrategy.CHECKPOINT and folders else {}

    def _submit(self, folder: str, message: str | None, checkpoints: list[Path]) -> Future:
        trainer = self.trainer
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        found = self._checkpoints(checkpoints)
        return self._executor.submit(
            push_model, folder, self.repo_id, commit_message=message, checkpoints=found, **self._options()
        )

    def push_checkpoint(self, folder: str) -> None:
        """Push a checkpoint in the background, unless the strategy is `end` or another push is running."""
        args = self.trainer.args
        if not self.trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.is_pushing() and not args.hub_always_push:
            return  # as in transformers: a later push includes the changes
        message = f"Training in progress, step {self.trainer.state.global_step}"
        future = self._submit(folder, message, [Path(folder)])
        future.add_done_callback(_warn)
        self._pushes[folder] = future

    def is_pushing(self, folder: str | None = None) -> bool:
        """Whether a push of this checkpoint (None: of any checkpoint) is still running."""
        pushes = self._pushes.values() if folder is None else filter(None, [self._pushes.get(folder)])
        return any(not push.done() for push in pushes)

    def push(self, message: str | None, checkpoints: list[Path]) -> str | None:
        """
        Push the output folder as it was saved, after the running pushes.

        Returns:
            The URL of the repository; None except on the main process.

        Raises:
            PushError: if the push fails; the message has the command that repeats it.
        """
        if not self.trainer.is_world_process_zero():
            return None
        args = self.trainer.args
        folder = args.output_dir
        try:
            return self._submit(folder, message, checkpoints).result()
        except PushError as error:
            more = f" --base {self.hub_base}" if self.hub_base else ""
            more += f" --revision {args.hub_revision}" if args.hub_revision else ""
            more += " --public" if args.hub_private_repo is False else ""
            raise PushError(
                f"{error}\nThe stage is trained and saved in {folder}. To push it: "
                f"empathic push {folder} {self.repo_id}{more}"
            ) from error


def _warn(push: Future) -> None:
    error = push.exception()
    if error is not None:
        logger.warning("A checkpoint was not pushed to the Hub; the training continues: %s", error)

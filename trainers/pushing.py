"""How a stage goes to the Hub while it trains and when it is done."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from empathic.hub import PushError, push_files
from empathic.hub_model import local_bases, push_model
from empathic.trainers.model_card import hub_id, quality, write_card, write_record

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"  # the folder in the repository, as transformers calls it


def check_base(base: str | dict, hub_base: str | None) -> None:
    """
    Raises:
        ValueError: for a stage on folders of this machine, which nobody could load from the Hub, without the id under
            which that base was pushed.
    """
    local = local_bases(base)
    if hub_base is not None and hub_id(hub_base) is None:
        raise ValueError(f"--hub_base {hub_base} is a folder or no id; it is the id of the base on the Hub.")
    if local and hub_base is None:
        raise ValueError(
            f"--push_to_hub: this stage stands on {local[0]}, a folder of this machine, so what is pushed could not be "
            "loaded. Push that base first and name its id with --hub_base ID; or train without --push_to_hub, make one "
            "model of the stage with `empathic merge`, and push that with `empathic push`."
        )


class HubPushing:
    """
    Mixin over `Trainer`: what it pushes is what `empathic push` would, in one commit each time.

    `hub_strategy`: `end` pushes once; `every_save` each checkpoint's model as well; `checkpoint` also the whole last
    checkpoint, in `last-checkpoint/`; `all_checkpoints` each in its own folder. Checkpoints are pushed beside the
    training, which goes on where one fails; only the main process pushes.
    """

    hub_base: str | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing yet: see `start_pushing`."""

    def start_pushing(self, hub_base: str | None = None) -> None:
        """
        Makes the repository, so that a push that cannot succeed fails before the training.

        Args:
            hub_base: the stage's base on the Hub, where the base is a folder of this machine.

        Raises:
            ValueError: see `check_base`.
            PushError: for a token, an id or a repository that will not do, or a base that is not there.
        """
        check_base(self.stage_record.base, hub_base)
        self.hub_base = hub_base
        self._pushes: dict[str, Future] = {}
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
        if not self.is_world_process_zero():
            return
        self._pusher = ThreadPoolExecutor(1, thread_name_prefix="push")  # one after the other
        options = self._push_options()
        message = options.pop("commit_message", "Training starts")
        own = self.stage_record.base
        base = options.pop("base") or (own if isinstance(own, str) else None)
        needs = () if base is None else (base,)
        push_files({}, {}, self.hub_model_id, repo_type="model", commit_message=message, needs=needs, **options)
        if "/" not in self.hub_model_id:
            self.hub_model_id = f"{HfApi(token=self.args.hub_token).whoami()['name']}/{self.hub_model_id}"

    def _push_options(self) -> dict:
        args = self.args
        return {
            "private": args.hub_private_repo is not False,
            "base": self.hub_base,
            "token": args.hub_token,
            "revision": args.hub_revision,
        }

    def _checkpoints(self, folders: list[Path]) -> dict[str, Path]:
        """What the strategy pushes of complete checkpoints, the newest last: by their folders in the repository."""
        if self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            return {folder.name: folder for folder in folders}
        return {LAST_CHECKPOINT: folders[-1]} if self.args.hub_strategy == HubStrategy.CHECKPOINT and folders else {}

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._is_pushing() and not self.args.hub_always_push:
            return  # as in transformers: this one is left out, the next or the last push brings what is missing
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        future = self._pusher.submit(
            push_model,
            checkpoint_folder,
            self.hub_model_id,
            commit_message=f"Training in progress, step {self.state.global_step}",
            checkpoints=self._checkpoints([Path(checkpoint_folder)]),
            **self._push_options(),
        )
        future.add_done_callback(_warn)
        self._pushes[checkpoint_folder] = future

    def _is_pushing(self, folder: str | None = None) -> bool:
        """Whether a checkpoint, or any, is on its way."""
        if not self.args.push_to_hub or not self.is_world_process_zero():
            return False
        pushes = self._pushes.values() if folder is None else filter(None, [self._pushes.get(folder)])
        return any(not push.done() for push in pushes)

    def _finish_current_push(self) -> None:
        """Nothing: the training does not wait. `push_to_hub` comes after those on their way."""

    def record_metrics(self, metrics: dict) -> None:
        """Adds a finished run's metrics to the record and the card in the output folder."""
        if not self.args.should_save:
            return
        self.stage_record.runs[-1]["metrics"] |= quality(metrics)
        write_record(self.args.output_dir, {"runs": self.stage_record.runs})
        write_card(self.args.output_dir)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> str | None:
        """
        Pushes the output folder as it was saved; returns its address, or None where this is not the main process.

        Raises:
            PushError: naming the command that repeats it.
        """
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        folder = self.args.output_dir
        checkpoints = [Path(path) for path in self._complete_checkpoints()]
        push = self._pusher.submit(
            push_model,
            folder,
            self.hub_model_id,
            commit_message=commit_message,
            checkpoints=self._checkpoints(checkpoints),
            **self._push_options(),
        )
        try:
            return push.result()
        except PushError as error:
            more = f" --base {self.hub_base}" if self.hub_base else ""
            more += f" --revision {self.args.hub_revision}" if self.args.hub_revision else ""
            more += " --public" if self.args.hub_private_repo is False else ""
            raise PushError(
                f"{error}\nThe stage is trained and lies in {folder}. To push it: "
                f"empathic push {folder} {self.hub_model_id}{more}"
            ) from error
        finally:
            if checkpoints:  # one that was on its way when the limit was reached is still there
                self._remove_older_checkpoints(checkpoints[-1])


def _warn(push: Future) -> None:
    error = push.exception()
    if error is not None:
        logger.warning("a checkpoint did not get to the Hub, the training goes on: %s", error)

"""Saving and resuming of a stage: only trained tensors, under every strategy, and never incomplete."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...composition_empathic import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PART_NAMES,
    PARTS_FILE,
    STAGE_FILE,
    check_tensors,
    read_stage,
    resolve_base,
)
from ...hub.model_card import kept_card, quality, read_record, write_card, write_record
from ..stopping import keep_workers
from .pushing import StagePusher
from .stage_folder import UNFINISHED, StageRecord

if TYPE_CHECKING:  # the mixin's methods use those of the Trainer that it is mixed into
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.get_logger(__name__)

COMPLETE_FILE = "checkpoint_complete.json"  # written last; a folder without this file is not a complete checkpoint


def _is_sharded_by_deepspeed(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # ZeRO-3 adds this attribute to its parameters


def whole_tensor(parameter: torch.Tensor, modify: bool = False):
    """A context in which ZeRO-3 gathers a parameter on every rank; `modify` also shards the changes made on rank 0."""
    if not _is_sharded_by_deepspeed(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modify else None)


def reshard(model: torch.nn.Module) -> None:
    """Shard FSDP2's parameters again: an evaluation leaves those outside of the decoder layers unsharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """
    Gather the named parameters, unsharded and on the CPU, for any sharding strategy. Every rank must call it.

    No other parameter is gathered: a stage that trains a million of seven billion parameters needs no memory for the
    frozen ones.
    """
    reshard(model)
    parameters, tensors = dict(model.named_parameters()), {}
    for name in names:
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            tensors[name] = parameter.detach().full_tensor().cpu().contiguous()
        else:
            with whole_tensor(parameter):
                tensors[name] = parameter.detach().cpu().contiguous().clone()
    return tensors


@torch.no_grad()
def scatter(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy unsharded tensors into the named parameters, for any sharding strategy. Every rank must call it."""
    reshard(model)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            tensor = tensor.to(parameter.device, parameter.dtype)
            parameter.copy_(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))
        else:
            with whole_tensor(parameter, modify=True):
                parameter.copy_(tensor)


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the unsharded shape of a parameter."""
    return parameter.ds_shape if _is_sharded_by_deepspeed(parameter) else parameter.shape


def adapter_keys(model: PeftModel, names: list[str]) -> dict[str, str]:
    """Map the keys of the named parameters in PEFT's adapter file to the parameter names."""
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    saved = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {key: names[int(number)] for key, number in saved.items()}


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was saved completely."""
    return Path(checkpoint, COMPLETE_FILE).is_file()


def complete_checkpoints(folder: str | os.PathLike) -> list[str]:
    """Return the complete checkpoints in a stage's folder, latest last."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and is_complete(path):
            found[int(step)] = str(path)
    return [found[step] for step in sorted(found)]


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the latest complete checkpoint in a stage's folder, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def checkpoint_to_resume(choice: str | None, folder: str) -> str | None:
    """
    Return the checkpoint that `--resume_from_checkpoint` means, or None to start from the beginning.

    Args:
        choice: None or `none` to start from the beginning; `auto` for the last complete checkpoint in `folder`, if
            any; otherwise a checkpoint's folder.
        folder: the stage's output folder.

    Raises:
        ValueError: if the folder is not a complete checkpoint; the message names the last complete one.
    """
    if choice is None or str(choice).lower() in ("none", "false"):
        return None
    if str(choice).lower() in ("auto", "true"):
        return last_checkpoint(folder)
    if not is_complete(choice):
        last = last_checkpoint(Path(choice).parent)
        raise ValueError(
            f"{choice} is not a complete checkpoint of a stage (it has no {COMPLETE_FILE}): its saving was "
            f"interrupted, or it is another folder. "
            + (f"The last complete one is {last}." if last else "Start the stage from the beginning.")
        )
    return str(choice)


def base_names(base: str | dict, folder: str, revision: str | None = None) -> list[str]:
    """Return the folders and ids of a base, resolved relative to the stage's `folder`, with the revision if any."""
    names = [base] if isinstance(base, str) else [base[name] for name in sorted(PART_NAMES)]
    names = [resolve_base(folder, name) for name in names]
    names = [os.path.realpath(name) if os.path.isdir(name) else name for name in names]
    return names if revision is None else [f"{name} at {revision}" for name in names]


def changed_settings(then: dict, now: dict) -> list[str]:
    """List the settings that differ between two runs, `name was ... and now is ...`; see `model_card.new_run`."""
    sides = []
    for run in (then, now):
        facts = {name: run[name] for name in ("learning_rate", "precision")}
        facts["data"] = ", ".join(data["name"] for data in run["data"])
        sides.append(facts | run["settings"])
    names = dict.fromkeys(name for side in sides for name in side)
    texts = [[json.dumps(side.get(name)) for side in sides] for name in names]
    return [f"{name} was {old} and now is {new}" for name, (old, new) in zip(names, texts, strict=True) if old != new]


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that an interruption leaves no partial checkpoint of this name."""
    if checkpoint.is_dir():
        going = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}-removed")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(checkpoint, going)
        shutil.rmtree(going)


def remove_unfinished(folder: Path) -> None:
    """Remove the folders of checkpoints whose saving or removal was interrupted."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


class StageSaving(_Trainer):
    """A mixin for `PackedTrainer` that saves and resumes the trained tensors of a stage instead of the whole model."""

    stage_record: StageRecord
    pusher: StagePusher | None = None

    def _bare_model(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _trained_names(self, model) -> list[str]:
        if isinstance(model, PeftModel):
            return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return self.stage_record.trained

    def get_eval_dataloader(self, *args, **kwargs):
        """As in transformers, with workers that outlive a signal to this process."""
        return keep_workers(super().get_eval_dataloader(*args, **kwargs))

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write a folder that `from_pretrained` and the next stage can load. Every rank must call it."""
        folder = self.args.output_dir if output_dir is None else output_dir
        model = self._bare_model()
        tensors = gather(model, self._trained_names(model))
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            for name in (STAGE_FILE, ADAPTER_CONFIG):  # an incomplete folder must not look like a stage's folder
                Path(folder, name).unlink(missing_ok=True)
            if isinstance(model, PeftModel):
                with kept_card(folder):
                    model.save_pretrained(folder, state_dict=tensors)
                model = model.get_base_model()
            else:
                save_file(tensors, os.path.join(folder, PARTS_FILE), metadata={"format": "pt"})
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, "training_args.bin"))
            self._note_progress()
            self.stage_record.save(model, folder)
        self.accelerator.wait_for_everyone()

    def _note_progress(self) -> None:
        if self.stage_record.runs:
            run, last = self.stage_record.runs[-1], {}
            for logs in self.state.log_history:
                last |= quality(logs)
            run |= {"steps": self.state.global_step, "strategy": self._run_facts()["strategy"]}
            run["metrics"] = run["metrics"] | last

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint to a temporary folder and rename it at the end, so that none is incomplete."""
        output = Path(self.args.output_dir)
        checkpoint = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = output / f"{UNFINISHED}{checkpoint.name}"
        if self.args.should_save:
            remove_unfinished(output)
        self.accelerator.wait_for_everyone()
        self.store_flos()
        self.save_model(str(unfinished), _internal_call=True)
        if self.state.best_global_step:
            best = output / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(unfinished))
            self._save_scaler(str(unfinished))
            self._save_rng_state(str(unfinished))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_state(unfinished)
            facts = {"step": self.state.global_step, "resumable": not self.args.save_only_model, **self._run_facts()}
            (unfinished / COMPLETE_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            remove_checkpoint(checkpoint)  # of an earlier run
            os.replace(unfinished, checkpoint)
            self._remove_older_checkpoints(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _save_state(self, folder: Path) -> None:
        """Save the state of the Trainer and of its callbacks."""
        states = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                if isinstance(states[name], list):
                    states[name].append(callback.state())
                else:
                    states[name] = callback.state()
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _remove_older_checkpoints(self, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        older = [path for path in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and path != newest]
        older.sort(key=lambda path: path.stat().st_mtime_ns)
        removable = [path for path in older if best is None or path != Path(best)]
        removable = [path for path in removable if not self._is_pushing(path)]  # removed after a later save
        for checkpoint in removable[: max(0, len(older) + 1 - limit)]:
            remove_checkpoint(checkpoint)

    def _is_pushing(self, checkpoint: Path) -> bool:
        return self.pusher is not None and self.pusher.is_pushing(str(checkpoint))

    def _run_facts(self) -> dict:
        """Return the facts that must be equal for a resumed run to continue like an uninterrupted run."""
        if self.is_deepspeed_enabled:
            strategy = f"zero{self.accelerator.deepspeed_plugin.zero_stage}"
        else:
            strategy = "fsdp" if self.is_fsdp_enabled else "data parallel"
        args = self.args
        return {
            "strategy": strategy,
            "world_size": args.world_size,
            "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # DeepSpeed and FSDP would also save the frozen parameters.
        if self.is_deepspeed_enabled:
            engine = self.model_wrapped
            save = engine.save_checkpoint
            engine.save_checkpoint = lambda folder: save(folder, exclude_frozen_parameters=True)
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            finally:
                engine.save_checkpoint = save
        elif self.is_fsdp_enabled:
            save_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
            )
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    # ---- Pushing ----

    def start_pushing(self, hub_base: str | None = None) -> None:
        """Create the repository, so that problems with the push are found before training. See `StagePusher`."""
        self.pusher = StagePusher(self, hub_base)
        self.pusher.start()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: `start_pushing` creates the repository."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.pusher is not None:
            self.pusher.push_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        """Do nothing: training does not wait for pushes. `push_to_hub` runs after the running pushes."""

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> str | None:
        """Push the output folder as it was saved; see `StagePusher.push`."""
        checkpoints = [Path(path) for path in complete_checkpoints(self.args.output_dir)]
        try:
            return self.pusher.push(commit_message, checkpoints)
        finally:
            if checkpoints and self.is_world_process_zero():  # includes checkpoints that were still being pushed
                self._remove_older_checkpoints(checkpoints[-1])

    def record_metrics(self, metrics: dict) -> None:
        """Add a finished run's metrics to the record and the card in the output folder."""
        if not self.args.should_save:
            return
        self.stage_record.runs[-1]["metrics"] |= quality(metrics)
        write_record(self.args.output_dir, {"runs": self.stage_record.runs})
        write_card(self.args.output_dir)

    # ---- Resuming ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, but without `train_loss` if a finished run was started again, where it would be 0."""
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            logs.pop("train_loss")
            logger.warning("The run was already finished at step %d; no step is trained.", self.state.global_step)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Do nothing: `_prepare_for_training` loads the trained tensors, in the same way for every strategy."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is not None:
            self._check_checkpoint(resume_from_checkpoint)  # before the model is sharded
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_trained(resume_from_checkpoint)
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        self._load_trained(self.state.best_model_checkpoint)

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raise a ValueError if this run could not continue from a checkpoint like an uninterrupted run."""
        record = read_stage(checkpoint)
        stage = record["stage"]
        if stage != self.stage_record.stage:
            raise ValueError(
                f"{checkpoint} is a checkpoint of stage {stage}, but this run trains stage {self.stage_record.stage}. "
                "To start from its weights, pass it as --model_name_or_path."
            )
        then, now = json.loads(Path(checkpoint, COMPLETE_FILE).read_text(encoding="utf-8")), self._run_facts()
        if not then["resumable"]:
            raise ValueError(
                f"{checkpoint} was saved with --save_only_model, without the optimizer state, so it cannot be resumed. "
                "To start from its weights, pass it as --model_name_or_path."
            )
        remedies = {
            "strategy": "one strategy cannot read the optimizer state of the other",
            "samples_per_step": "change --per_device_train_batch_size or --gradient_accumulation_steps until the "
            "numbers agree, otherwise samples would be skipped or repeated",
            "seed": "other samples would be drawn",
        }
        if then["strategy"].startswith("zero"):
            remedies["world_size"] = "DeepSpeed needs as many processes to read the optimizer state as wrote it"
        problems = [
            f"{name} was {then[name]} and now is {now[name]} ({remedy})"
            for name, remedy in remedies.items()
            if then[name] != now[name]
        ]
        old = base_names(record["base"], checkpoint, record.get("base_revision"))
        new = base_names(self.stage_record.base, checkpoint, self.stage_record.base_revision)
        # If a base folder was moved, it cannot be compared.
        moved = any(name.startswith((".", "/")) and not os.path.isdir(name) for name in old)
        if old != new and not moved:
            texts = " and ".join(old), " and ".join(new)
            problems.append(f"the base was {texts[0]} and now is {texts[1]} (the trained weights fit only the first)")
        if problems:
            raise ValueError(f"{checkpoint} cannot be resumed by this run: {'; '.join(problems)}.")
        self._compare_settings(checkpoint)

    def _compare_settings(self, checkpoint: str) -> None:
        """Warn about settings that differ from those of the resumed run."""
        earlier = read_record(checkpoint)["runs"]
        if not earlier or not self.stage_record.runs:
            return
        run = self.stage_record.runs[-1]
        changed = changed_settings(earlier[-1], run)
        if changed:
            logger.warning(
                "%s comes from a run with other settings: %s. The learning rate and the optimizer settings of the "
                "checkpoint are kept. To train with the new settings from the beginning, use --resume_from_checkpoint "
                "none.",
                checkpoint,
                "; ".join(changed),
            )
        run["learning_rate"] = earlier[-1]["learning_rate"]  # the optimizer state restores it

    def _load_trained(self, checkpoint: str) -> None:
        model = self._bare_model()
        names = self._trained_names(model)
        if isinstance(model, PeftModel):
            file = os.path.join(checkpoint, ADAPTER_FILE)
            keys = adapter_keys(model, names)
        else:
            file = os.path.join(checkpoint, PARTS_FILE)
            keys = {name: name for name in names}
        tensors, parameters = load_file(file), dict(model.named_parameters())
        shapes = {key: whole_shape(parameters[name]) for key, name in keys.items()}
        check_tensors(file, tensors, shapes)
        scatter(model, {keys[key]: tensor for key, tensor in tensors.items()})

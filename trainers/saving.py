"""How a stage is saved and resumed: only what it trained, under every strategy, and never by halves."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from empathic.composition_empathic import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PARTS_FILE,
    STAGE_FILE,
    check_tensors,
    read_stage,
    resolve_base,
)
from empathic.trainers.checkpoint import UNFINISHED, StageRecord
from empathic.trainers.frozen_clips import FrozenClips
from empathic.trainers.model_card import kept_card, quality, read_record
from empathic.trainers.monitor import Monitored, NamedSamples
from empathic.trainers.packed_rows import PackedLoss
from empathic.trainers.pushing import HubPushing

logger = logging.get_logger(__name__)

COMPLETE_FILE = "checkpoint_complete.json"  # the last file of a checkpoint; a folder without it is none


def _is_sharded_by_deepspeed(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")  # what ZeRO-3 marks its parameters with


def whole_tensor(parameter: torch.Tensor, modify: bool = False):
    """A context in which ZeRO-3 gathers a parameter on every rank (with `modify`: and shards rank 0's changes)."""
    if not _is_sharded_by_deepspeed(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modify else None)


def reshard(model: torch.nn.Module) -> None:
    """Divides FSDP2's parameters again; an evaluation leaves those outside of the decoder layers whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """
    The named parameters, whole and on the CPU, however the model is sharded. Every rank has to call it.

    Nothing else is gathered: a stage that trains a million parameters of a model of seven billion needs no memory for
    the rest.
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
    """Puts whole tensors into the parameters of these names, however the model is sharded. Every rank calls it."""
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
    """The shape of a parameter, however it is sharded."""
    return parameter.ds_shape if _is_sharded_by_deepspeed(parameter) else parameter.shape


def adapter_keys(model: PeftModel, names: list[str]) -> dict[str, str]:
    """What PEFT calls the named parameters in an adapter's file -> their names."""
    numbered = {name: torch.tensor(number) for number, name in enumerate(names)}
    saved = get_peft_model_state_dict(model, state_dict=numbered, save_embedding_layers=False)
    return {key: names[int(number)] for key, number in saved.items()}


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether the saving of a checkpoint came to its end."""
    return Path(checkpoint, COMPLETE_FILE).is_file()


def complete_checkpoints(folder: str | os.PathLike) -> list[str]:
    """The complete checkpoints in a stage's folder, the latest last."""
    found = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.rpartition("-")[2]
        if step.isdecimal() and is_complete(path):
            found[int(step)] = str(path)
    return [found[step] for step in sorted(found)]


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The latest complete checkpoint in a stage's folder, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def checkpoint_to_resume(choice: str | None, folder: str) -> str | None:
    """
    What `--resume_from_checkpoint` means.

    Args:
        choice: None or `none` to start anew; `auto` for the last complete checkpoint in `folder`, or a new start where
            there is none; else a checkpoint's folder.
        folder: the stage's output folder.

    Raises:
        ValueError: for a folder that is no complete checkpoint, naming those that are.
    """
    if choice is None or str(choice).lower() in ("none", "false"):
        return None
    if str(choice).lower() in ("auto", "true"):
        return last_checkpoint(folder)
    if not is_complete(choice):
        last = last_checkpoint(Path(choice).parent)
        raise ValueError(
            f"{choice} is no complete checkpoint of a stage (it has no {COMPLETE_FILE}): it was cut off while it was "
            f"saved, or is something else. "
            + (f"The last complete one is {last}." if last else "Start the stage anew.")
        )
    return str(choice)


def base_names(base: str | dict, folder: str) -> list[str]:
    """The folders and ids of a base that a stage's file in `folder` names."""
    names = [base] if isinstance(base, str) else [value for _, value in sorted(base.items()) if isinstance(value, str)]
    names = [resolve_base(folder, name) for name in names]
    return [os.path.realpath(name) if os.path.isdir(name) else name for name in names]


def changed_settings(then: dict, now: dict) -> list[str]:
    """What two runs were told differently, `name was ... and now is ...`; see `model_card.new_run`."""
    sides = []
    for run in (then, now):
        facts = {name: run[name] for name in ("learning_rate", "precision")}
        facts["data"] = ", ".join(data["name"] for data in run["data"])
        sides.append(facts | run["settings"])
    names = dict.fromkeys(name for side in sides for name in side)
    texts = [[json.dumps(side.get(name)) for side in sides] for name in names]
    return [f"{name} was {old} and now is {new}" for name, (old, new) in zip(names, texts, strict=True) if old != new]


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint; a kill in between leaves nothing of that name."""
    if checkpoint.is_dir():
        going = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}-removed")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(checkpoint, going)
        shutil.rmtree(going)


def remove_unfinished(folder: Path) -> None:
    """Removes what saving, or removing, a checkpoint left when it was cut off."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


class StageSaving(HubPushing):
    """Mixin over `Trainer`: saves and resumes what a stage trains instead of the whole model, under any strategy."""

    stage_record: StageRecord

    def _complete_checkpoints(self) -> list[str]:
        return complete_checkpoints(self.args.output_dir)

    def _bare_model(self):
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _trained_names(self, model) -> list[str]:
        if isinstance(model, PeftModel):
            return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return self.stage_record.trained

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes a folder that `from_pretrained` and the next stage take as it is. Every rank calls it."""
        folder = self.args.output_dir if output_dir is None else output_dir
        model = self._bare_model()
        tensors = gather(model, self._trained_names(model))
        if self.args.should_save:
            os.makedirs(folder, exist_ok=True)
            for name in (STAGE_FILE, ADAPTER_CONFIG):  # until all is written, it is no stage's folder
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
        """Writes a checkpoint beside its place and moves it there at the end, so that a kill in between leaves none."""
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
        """The Trainer's own state, with that of its callbacks."""
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
        removable = [path for path in removable if not self._is_pushing(str(path))]  # it goes after the next one
        for checkpoint in removable[: max(0, len(older) + 1 - limit)]:
            remove_checkpoint(checkpoint)

    def _run_facts(self) -> dict:
        """What has to be the same for a resumed run to go on as the unbroken one would have."""
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
        # DeepSpeed and FSDP would save the frozen model too.
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

    # ---- Resuming ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, but without the `train_loss` of a finished run that was started again: it would be 0."""
        if "train_loss" in logs and self.state.global_step == self._initial_global_step:
            logs.pop("train_loss")
            logger.warning("The run was finished at step %d, so nothing is trained.", self.state.global_step)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Nothing yet: what was trained is loaded when the model is prepared, in the same way for every strategy."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is not None:
            self._check_checkpoint(resume_from_checkpoint)  # before anything is spread over the processes
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
        """ValueError for a checkpoint that this run cannot go on from as the unbroken run would have."""
        record = read_stage(checkpoint)
        stage = record["stage"]
        if stage != self.stage_record.stage:
            raise ValueError(
                f"{checkpoint} is of the stage {stage}, this run is of the stage {self.stage_record.stage}. To start "
                "from what it trained, name it as --model_name_or_path."
            )
        then, now = json.loads(Path(checkpoint, COMPLETE_FILE).read_text(encoding="utf-8")), self._run_facts()
        if not then["resumable"]:
            raise ValueError(f"{checkpoint} was saved with --save_only_model: it has no state of the optimizer.")
        mends = {
            "strategy": "the optimizer's state of one is not readable by the other",
            "samples_per_step": "change --per_device_train_batch_size or --gradient_accumulation_steps until they "
            "agree, or samples would be left out or repeated",
            "seed": "other samples would be drawn",
        }
        if then["strategy"].startswith("zero"):
            mends["world_size"] = "DeepSpeed reads the optimizer's state back with as many processes as wrote it"
        problems = [
            f"{name} was {then[name]} and now is {now[name]} ({mend})"
            for name, mend in mends.items()
            if then[name] != now[name]
        ]
        old, new = (base_names(base, checkpoint) for base in (record["base"], self.stage_record.base))
        # Of a folder that is not where it was it cannot be told.
        moved = any(name.startswith((".", "/")) and not os.path.isdir(name) for name in old)
        if old != new and not moved:
            texts = " and ".join(old), " and ".join(new)
            problems.append(f"the base was {texts[0]} and now is {texts[1]} (what was trained fits the first alone)")
        if problems:
            raise ValueError(f"{checkpoint} cannot be resumed by this run: {'; '.join(problems)}.")
        self._compare_settings(checkpoint)

    def _compare_settings(self, checkpoint: str) -> None:
        """Warns of what a run that goes on is told otherwise than before."""
        earlier = read_record(checkpoint)["runs"]
        if not earlier or not self.stage_record.runs:
            return
        run = self.stage_record.runs[-1]
        changed = changed_settings(earlier[-1], run)
        if changed:
            logger.warning(
                "%s comes from a run with other settings: %s. The learning rate and the optimizer's own settings stay "
                "those of the checkpoint. To train with the new ones from the start, take --resume_from_checkpoint "
                "none.",
                checkpoint,
                "; ".join(changed),
            )
        run["learning_rate"] = earlier[-1]["learning_rate"]  # as the optimizer's state brings it

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


class StageTrainer(StageSaving, Monitored, NamedSamples, FrozenClips, PackedLoss, Trainer):
    """`transformers.Trainer` for the supervised stages."""

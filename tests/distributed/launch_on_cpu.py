"""
What `accelerate launch` starts in the tests: training runs, one after the other, in processes of a CPU.

    accelerate launch --config_file FILE tests/distributed/launch_on_cpu.py JOBS.json

JOBS.json: `{"type": what accelerate calls the strategy, "processes": 2, "runs": [{"arguments": those of the stage
script, "patch": null or a file whose `prepare(trainer)` changes the trainer before it starts}, ...]}`. FSDP and ZeRO-3
are made to shard there too, which on a CPU they would not do by themselves, and it is checked that they do.
"""

import json
import os
import runpy
import sys


def force_deepspeed() -> None:
    """No operator is compiled, and ZeRO-3 also shards parameters as small as those of the tests."""
    import deepspeed.ops
    from accelerate.utils import DeepSpeedPlugin

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled for minutes
    set_up = DeepSpeedPlugin.__post_init__

    def __post_init__(self):
        set_up(self)
        self.hf_ds_config.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, as on a GPU without offload
        self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = __post_init__


def force_fsdp() -> None:
    """accelerate turns FSDP into DDP on a CPU."""
    from accelerate import DistributedType, state

    set_up = state.AcceleratorState.__init__

    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        set_up(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    state.AcceleratorState.__init__ = __init__


def check_strategy(trainer, wanted: dict) -> None:
    """That the run is not by mistake of one process, or of another strategy, or unsharded."""
    accelerator = trainer.accelerator
    found = {"processes": accelerator.num_processes, "type": accelerator.distributed_type.value}
    expected = {key: wanted[key] for key in found}
    assert found == expected, f"{found} instead of {expected}"


def check_sharding(trainer) -> None:
    """That ZeRO-3 and FSDP2 divided the language model."""
    from torch.distributed.tensor import DTensor

    parameters = [p for name, p in trainer.model.named_parameters() if "q_proj" in name and "language_model" in name]
    assert parameters
    if trainer.is_fsdp_enabled:
        assert all(isinstance(p, DTensor) for p in parameters)
    elif trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_plugin.zero_stage == 3:
        assert all(p.ds_tensor.numel() < p.ds_numel for p in parameters)


def main(path: str) -> None:
    """Runs the jobs of a file."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        force_deepspeed()
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        force_fsdp()
    import torch
    from transformers import Trainer, TrainerCallback

    from empathic.trainers import train

    torch.set_num_threads(1)
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)

    class Check(TrainerCallback):
        """After the first step the model is surely prepared."""

        def on_step_end(self, args, state, control, **kwargs):
            check_sharding(trainers[-1])

    trainers, patches, start = [], [], Trainer.train

    def checked_train(self, *args, **kwargs):
        check_strategy(self, jobs)
        trainers.append(self)
        self.add_callback(Check())
        if patches[-1] is not None:
            runpy.run_path(patches[-1])["prepare"](self)
        return start(self, *args, **kwargs)

    Trainer.train = checked_train
    for run in jobs["runs"]:
        print("RUN", *run["arguments"], flush=True)
        patches.append(run["patch"])
        train.main(run["arguments"])
        trainers.clear()


if __name__ == "__main__":
    from empathic.processes import leave

    main(sys.argv[1])
    leave(0)

"""Description of the machine that runs a benchmark."""

import os
import platform

import torch

from ..evaluation.results import versions


def describe_machine(device: str = "cpu") -> dict:
    """
    Describe the machine: its `device` (the GPU's name for "cuda" if there is a GPU, else "cpu"), `processor` and
    `cores`, the `threads` in use, the one-minute `load`, package `versions`, and for a GPU its memory in GiB and the
    CUDA version.
    """
    is_cuda = device.startswith("cuda") and torch.cuda.is_available()
    found = {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions(),
    }
    if is_cuda:
        found["gpu_memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        found["cuda"] = torch.version.cuda
    return found

"""Where a benchmark ran."""

import os
import platform

import torch

from empathic.evaluation.results import versions


def describe_machine(device: str = "cpu") -> dict:
    """
    The machine's `device` (the GPU's name for "cuda", if there is one, else "cpu") and `processor`, its `cores`, the
    `threads` in use, the `load` of one minute, CUDA's version and the memory in GiB for a GPU, and all `versions`.
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

"""
The selective scan beside transformers' default path: seconds and memory of a forward and a backward pass.

transformers runs Mamba-1 without the mamba-ssm kernels as a loop over time under autograd. Compared are the scans
alone, and a whole encoder of one layer, whose projections cost both sides the same. Both sides compute the same values,
which is checked.
"""

import statistics
import time

import torch
from torch.nn import functional as F
from transformers import MambaConfig, MambaModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from empathic.benchmarks.memory_plan import LiveMemory
from empathic.memory_empathic import MambaCompressor
from empathic.scan_empathic import selective_scan

STATE = 16  # of Mamba's recurrence, as in the public models
MEM = 99  # id of <MEM>


def scan_sides(width: int, length: int, batch: int) -> dict:
    """{"ours", "transformers"}: (run, tensors that it holds). `run()` gives the gradient of the scan's input."""
    draw = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(batch, length, size, generator=draw) for size in (width, STATE, STATE))
    delta = F.softplus(torch.randn(batch, length, width, generator=draw) - 3)
    A = -torch.arange(1.0, STATE + 1).repeat(width, 1)
    tensors = [tensor.requires_grad_() for tensor in (u, delta, A, B, C)]

    def backward(y: torch.Tensor) -> torch.Tensor:
        grad, *_ = torch.autograd.grad(y.square().sum(), tensors)
        return grad

    def transformers() -> torch.Tensor:
        across = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
        u_t, delta_t, B_t, C_t = across
        return backward(mamba_selective_scan(u_t, delta_t, A, B_t, C_t))

    sides = {"ours": lambda: backward(selective_scan(u, delta, A, B, C)[0]), "transformers": transformers}
    return {name: (run, tensors) for name, run in sides.items()}


def encoder_sides(width: int, length: int, batch: int) -> dict:
    """As `scan_sides`, of encoders of one layer; `run()` gives the gradient of the embedding of `<MEM>`."""
    config = MambaConfig(hidden_size=width, num_hidden_layers=1, vocab_size=100, state_size=STATE)
    torch.manual_seed(0)
    ours = MambaCompressor(config, width, MEM, projector_scale=1.0)
    plain = MambaModel(config)
    plain.load_state_dict(ours.mamba.state_dict())
    ids = torch.randint(0, MEM, (batch, length))
    ids[:, length // 2] = ids[:, -1] = MEM
    is_mem = ids == MEM

    def transformers() -> torch.Tensor:
        embedded = plain.get_input_embeddings()(ids)
        embedded = torch.where(is_mem[..., None], ours.mem_embedding, embedded)
        hidden = plain(inputs_embeds=embedded, use_cache=False).last_hidden_state
        loss = ours.projector(hidden[is_mem]).sum()
        weights = [w for w in plain.parameters() if w is not plain.get_input_embeddings().weight]
        return torch.autograd.grad(loss, [ours.mem_embedding, *weights])[0]

    def own() -> torch.Tensor:
        weights = [w for w in ours.mamba.parameters() if w is not ours.mamba.get_input_embeddings().weight]
        return torch.autograd.grad(ours(ids).sum(), [ours.mem_embedding, *weights])[0]

    return {"ours": (own, [*ours.parameters()]), "transformers": (transformers, [*plain.parameters()])}


def peaks(sides: dict) -> dict:
    """{side: (largest number of bytes that tensors held at once, inputs and weights included; `run()`'s gradient)}."""
    found = {}
    for name, (run, held) in sides.items():
        with LiveMemory(held) as live:
            gradient = run()
        found[name] = (live.peak, gradient)
    return found


def compare(sides: dict, repeats: int) -> dict:
    """
    Runs both sides in turn.

    Returns:
        of each side `seconds` (median, of the processor) and `peak_bytes`; `speedup`, `memory` (ours / transformers)
        and `largest_difference` of the gradients, relative to the largest entry.
    """
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, (run, _) in sides.items():
            start = time.process_time()
            run()
            if turn:  # the first call allocates
                seconds[name].append(time.process_time() - start)
    found = peaks(sides)
    result = {
        name: {"seconds": statistics.median(seconds[name]), "peak_bytes": size} for name, (size, _) in found.items()
    }
    ours, other = result["ours"], result["transformers"]
    gradients = {name: gradient for name, (_, gradient) in found.items()}
    difference = (gradients["ours"] - gradients["transformers"]).abs().max() / gradients["transformers"].abs().max()
    return {
        **result,
        "speedup": other["seconds"] / ours["seconds"],
        "memory": ours["peak_bytes"] / other["peak_bytes"],
        "largest_difference": float(difference),
    }


def measure_scan(repeats: int = 5, width: int = 256, lengths: tuple[int, ...] = (128, 512), batch: int = 1) -> dict:
    """{"scan", "encoder"}: {length: `compare`} of the scans alone and of encoders of one layer."""
    return {
        "scan": {str(length): compare(scan_sides(width, length, batch), repeats) for length in lengths},
        "encoder": {str(length): compare(encoder_sides(width, length, batch), repeats) for length in lengths},
        "width": width,
        "batch_size": batch,
    }

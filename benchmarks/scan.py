"""
Compare our selective scan with transformers' default path: seconds and memory of a forward and a backward pass.

Without the mamba-ssm kernels, transformers runs Mamba-1 as a loop over time under autograd. We compare the scans alone,
and whole encoders of one layer, whose projections have equal costs on both sides. Both sides compute equal gradients;
the results include their largest difference.
"""

import statistics
import time

import torch
from torch.nn import functional as F
from transformers import MambaConfig, MambaModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from ..memory_empathic import MambaCompressor
from ..scan_empathic import selective_scan
from .memory_plan import LiveMemory

STATE_SIZE = 16  # state size of Mamba's recurrence, as in the public models
MEM = 99  # id of <MEM>


def scan_sides(width: int, length: int, batch: int) -> dict:
    """
    Return {"ours", "transformers"}: (`run`, tensors that it holds). `run()` returns the gradient of the scan's input.
    """
    draw = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(batch, length, size, generator=draw) for size in (width, STATE_SIZE, STATE_SIZE))
    delta = F.softplus(torch.randn(batch, length, width, generator=draw) - 3)
    A = -torch.arange(1.0, STATE_SIZE + 1).repeat(width, 1)
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
    """Like `scan_sides`, for encoders of one layer; `run()` returns the gradient of the embedding of `<MEM>`."""
    config = MambaConfig(hidden_size=width, num_hidden_layers=1, vocab_size=100, state_size=STATE_SIZE)
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
    """Return {side: (peak bytes of live tensors, including inputs and weights; gradient from `run()`)}."""
    found = {}
    for name, (run, held) in sides.items():
        with LiveMemory(held) as live:
            gradient = run()
        found[name] = (live.peak, gradient)
    return found


def compare(sides: dict, repeats: int) -> dict:
    """
    Run both sides alternately.

    Returns:
        for each side `seconds` (median CPU time) and `peak_bytes`; `speedup`, `memory` (ours / transformers), and the
        `largest_difference` of the gradients relative to the largest entry.
    """
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, (run, _) in sides.items():
            start = time.process_time()
            run()
            if turn:  # the first call is not timed, because it allocates memory
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
    """Return {"scan", "encoder"}: {length: result of `compare`}, for the scans alone and for encoders of one layer."""
    return {
        "scan": {str(length): compare(scan_sides(width, length, batch), repeats) for length in lengths},
        "encoder": {str(length): compare(encoder_sides(width, length, batch), repeats) for length in lengths},
        "width": width,
        "batch_size": batch,
    }

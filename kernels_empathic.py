"""Compiled kernels for the memory encoder on a GPU: Mamba's recurrences and its causal convolution.

Each function is taken from the first source that has it and agrees with this model's own code on a small example:

1. the Hub's `kernels-community/mamba-ssm`, through the package `kernels` (off with `USE_HUB_KERNELS=NO`);
2. the packages `mamba-ssm` and `causal-conv1d`;
3. this model's own code (`scan_empathic.py`), which is exact and runs on any device.

The functions here have the contracts of that code: they start from any state and return the final state, and a time
step of 0 does not change the state. Streams and padded batches therefore have the same results with every source.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from transformers.utils import ENV_VARS_TRUE_VALUES, logging

from .scan_empathic import autocast_off, selective_scan, ssd_scan

logger = logging.get_logger(__name__)

HUB_REPOSITORY = "kernels-community/mamba-ssm"
# Versions that have these functions, newest first. A version has builds for the releases of torch of its time only.
HUB_VERSIONS = (5, 4, 3, 2)
SCAN, SSD, CONVOLUTION = "selective_scan_fn", "mamba_chunk_scan_combined", "causal_conv1d_fn"
PACKAGES = {
    SCAN: "mamba_ssm.ops.selective_scan_interface",
    SSD: "mamba_ssm.ops.triton.ssd_combined",
    CONVOLUTION: "causal_conv1d",
}
EXACT = "PyTorch"  # name of the third source

# Largest difference from this model's own code on the example, relative to the largest value. Mamba-2's kernel computes
# its matrix products in half precision.
TOLERANCES = {SCAN: 1e-3, SSD: 3e-2, CONVOLUTION: 1e-3}
# Elements of the (batch, steps, inner, state) buffers with which a carried state is added.
_BLOCK_ELEMENTS = 1 << 25

_allowed = True


@contextmanager
def without_kernels() -> Iterator[None]:
    """Use only this model's own code within the block, to compare kernels with it."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def kernel_source(name: str, device: torch.device) -> str:
    """Return where `SCAN`, `SSD` or `CONVOLUTION` comes from on a device; the first call may download the kernel."""
    return _choose(name, device)[1] if _on_gpu(device) else EXACT


# --------------------------------------------------------------------------------------------------------- the sources


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _hub_layers():
    """Load the Hub's kernels: a module whose classes are called like functions, or the reason why there is none."""
    if os.environ.get("USE_HUB_KERNELS", "YES").upper() not in ENV_VARS_TRUE_VALUES:
        return "USE_HUB_KERNELS turns them off"
    try:
        kernels = importlib.import_module("kernels")
    except ImportError as error:
        return str(error)
    reason = ""
    for version in HUB_VERSIONS:
        try:
            return kernels.get_kernel(HUB_REPOSITORY, version=version).layers
        except Exception as error:  # no build for this torch or GPU, no network, a missing package
            reason = reason or str(error)
    return reason


def _from_hub(name: str) -> Callable:
    layers = _hub_layers()
    if isinstance(layers, str):
        raise ImportError(layers)
    return getattr(layers, name)()


def _from_package(name: str) -> Callable:
    return getattr(importlib.import_module(PACKAGES[name]), name)


@cache
def _choose(name: str, device: torch.device) -> tuple[Callable | None, str, str]:
    """Choose a function: the function (None: this model's own code), its source, and why earlier sources were left."""
    left = []
    for source, load in ((f"the Hub's {HUB_REPOSITORY}", _from_hub), (PACKAGES[name].split(".")[0], _from_package)):
        try:
            kernel = load(name)
            # Inference mode would mark the tensors, which the backward pass of the example does not allow.
            with torch.inference_mode(False), torch.enable_grad(), autocast_off(device):
                far = _EXAMPLES[name](kernel, device)
            if far <= TOLERANCES[name]:
                return kernel, source, "; ".join(left)
            left.append(f"{source} differs from the exact code by {far:.2g} of the largest value")
        except Exception as error:  # a kernel that does not load or run can raise many types of errors
            left.append(f"{source}: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}")
    return None, EXACT, "; ".join(left)


def _kernel(name: str, tensor: torch.Tensor) -> Callable | None:
    """The kernel for a tensor (batch, length, ...), or None; log the sources when a recurrence is first used."""
    if not _allowed or not _on_gpu(tensor.device) or tensor.dtype == torch.float64 or tensor.shape[1] == 0:
        return None
    kernel, source, left = _choose(name, tensor.device)
    if name != CONVOLUTION:
        _, convolution, also_left = _choose(CONVOLUTION, tensor.device)
        reasons = "; ".join(dict.fromkeys(filter(None, (left, also_left))))
        logger.warning_once(
            f"The memory encoder's recurrence runs by {source}, its convolution by {convolution}."
            + (f" (Not used: {reasons}.)" if EXACT in (source, convolution) else "")
        )
    return kernel


# ------------------------------------------------------------------------------------------------------- the functions


@torch.compiler.disable
def run_selective_scan(u, delta, A, B, C, start=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `selective_scan`, by a kernel if there is one; a kernel's final state has no gradient."""
    kernel = _kernel(SCAN, u)
    return selective_scan(u, delta, A, B, C, start) if kernel is None else _scan_by(kernel, u, delta, A, B, C, start)


def _scan_by(kernel: Callable, u, delta, A, B, C, start) -> tuple[torch.Tensor, torch.Tensor]:
    """Run Mamba-1's kernel, which starts from zero, and add what a carried state contributes."""
    with autocast_off(u.device):
        u, delta, A, B, C = (tensor.float() for tensor in (u, delta, A, B, C))
        across = [tensor.transpose(1, 2).contiguous() for tensor in (u, delta, B, C)]
        y, end = kernel(across[0], across[1], A.contiguous(), *across[2:], return_last_state=True)
        y = y.transpose(1, 2)
        return (y, end) if start is None else _continue(y, end, delta, A, C, start.float())


def _continue(y, end, delta, A, C, start) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a carried state (batch, inner, state) to a scan that started from zero. The recurrence is linear: after the
    time t, what is left of the state is its product with exp(A * sum of delta up to t)."""
    passed = delta.cumsum(1)  # (batch, length, inner)
    batch, length, inner = delta.shape
    steps = max(1, _BLOCK_ELEMENTS // (batch * inner * A.shape[1]))
    added = []
    for first in range(0, length, steps):
        cut = slice(first, first + steps)
        left = (passed[:, cut, :, None] * A).exp() * start[:, None]  # (batch, steps, inner, state)
        added.append((left @ C[:, cut, :, None])[..., 0])
    return y + torch.cat(added, 1), end + start * (passed[:, -1, :, None] * A).exp()


@torch.compiler.disable
def run_ssd_scan(u, delta, A, B, C, start=None, chunk_size=256) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `ssd_scan`, by a kernel if there is one. A kernel runs for half precision only: it rounds the factors of
    float32 products to TF32."""
    kernel = None if u.dtype not in (torch.float16, torch.bfloat16) else _kernel(SSD, u)
    if kernel is None:
        return ssd_scan(u, delta, A, B, C, start, chunk_size=min(chunk_size, 64))
    return _ssd_by(kernel, u, delta, A, B, C, start, chunk_size)


def _ssd_by(kernel: Callable, u, delta, A, B, C, start, chunk_size) -> tuple[torch.Tensor, torch.Tensor]:
    start = None if start is None else start.float()
    with autocast_off(u.device):
        y, end = kernel(
            *(u.contiguous(), delta.float(), A.float(), B.to(u.dtype), C.to(u.dtype)),
            chunk_size=chunk_size,
            initial_states=start,
            return_final_states=True,
        )
    return y, end.float()


def convolution_kernel(x: torch.Tensor, conv: torch.nn.Conv1d, activation: str) -> Callable | None:
    """Return a function that runs a causal depthwise convolution with its activation, or None where no kernel does.
    The function takes x (batch, length, channels), with zeros before it, and returns the same shape and dtype."""
    taps, channels = conv.weight.shape[-1], x.shape[-1]
    if not 2 <= taps <= 4 or channels % 8 or activation not in ("silu", "swish"):
        return None
    kernel = _kernel(CONVOLUTION, x)
    return None if kernel is None else lambda x: _convolve_by(kernel, x, conv.weight[:, 0], conv.bias)


def _convolve_by(kernel: Callable, x, weight, bias) -> torch.Tensor:
    with autocast_off(x.device):
        return kernel(x.contiguous().transpose(1, 2), weight.contiguous(), bias, activation="silu").transpose(1, 2)


# -------------------------------------------------------------------------------------------------------- the examples


def _far(found, wanted) -> float:
    """The largest difference of tensors, relative to the largest value of each wanted tensor."""
    return max(
        float((one.float() - other.float()).abs().max() / other.float().abs().max())
        for one, other in zip(found, wanted, strict=True)
    )


def _draw(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(device) for shape in shapes]


def _outputs(run: Callable, u: torch.Tensor) -> list[torch.Tensor]:
    """The output and the final state of a scan, and the gradient of its input."""
    u = u.detach().requires_grad_()
    y, end = run(u)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), u)
    return [y.detach(), end.detach(), gradient]


def _example_of_scan(kernel: Callable, device: torch.device) -> float:
    u, delta, A, B, C, start = _draw(device, (2, 9, 32), (2, 9, 32), (32, 16), (2, 9, 16), (2, 9, 16), (2, 32, 16))
    delta, A = F.softplus(delta), -A.exp()
    delta[1, 5:] = 0
    wanted = _outputs(lambda u: selective_scan(u, delta, A, B, C, start), u)
    return _far(_outputs(lambda u: _scan_by(kernel, u, delta, A, B, C, start), u), wanted)


def _example_of_ssd(kernel: Callable, device: torch.device) -> float:
    u, delta, A, B, C, start = _draw(
        device, (2, 24, 4, 32), (2, 24, 4), (4,), (2, 24, 2, 32), (2, 24, 2, 32), (2, 4, 32, 32)
    )
    u, B, C, delta, A = (*(tensor.bfloat16() for tensor in (u, B, C)), F.softplus(delta), -A.exp())
    delta[1, 15:] = 0
    wanted = _outputs(lambda u: ssd_scan(u, delta, A, B, C, start), u)
    return _far(_outputs(lambda u: _ssd_by(kernel, u, delta, A, B, C, start, 64), u), wanted)


def _example_of_convolution(kernel: Callable, device: torch.device) -> float:
    x, weight, bias = _draw(device, (2, 9, 32), (32, 4), (32,))
    out = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=32)[..., :9].transpose(1, 2)
    return _far([_convolve_by(kernel, x, weight, bias)], [F.silu(out)])


_EXAMPLES = {SCAN: _example_of_scan, SSD: _example_of_ssd, CONVOLUTION: _example_of_convolution}

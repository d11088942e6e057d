"""Attention of the segments of a packed row, with a plain torch version of the kernel, which runs only on GPUs."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from empathic.trainers.packing import varlen_attention
from empathic.trainers.packing.rows import RowLayout
from empathic.trainers.packing.shared_prefix import PairLayout

DTYPE = torch.float64


def kernel(query, key, value, query_bounds, key_bounds, longest_query, longest_key, scale=None, window_size=(-1, -1)):
    """The documented behavior of `varlen_attn`, segment by segment; a causal mask is aligned at the end of the keys."""
    assert window_size == (-1, 0) and query_bounds.dtype == key_bounds.dtype == torch.int32
    outputs = []
    for place in range(len(query_bounds) - 1):
        rows, columns = slice(*query_bounds[place : place + 2]), slice(*key_bounds[place : place + 2])
        parts = [part.transpose(0, 1) for part in (query[rows], key[columns], value[columns])]
        length, seen = parts[0].shape[1], parts[1].shape[1]
        assert length <= longest_query and seen <= longest_key
        mask = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
        outputs.append(scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale).transpose(0, 1))
    return torch.cat(outputs)


def wrong_kernel(*args, **kwargs):
    return kernel(*args, **kwargs).roll(1, dims=0)


def missing_kernel(*args, **kwargs):
    raise RuntimeError("no kernel image")


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 20, 4, dtype=DTYPE, generator=generator).requires_grad_() for _ in range(3)]


LAYOUTS = {
    "pairs": lambda: PairLayout([(0, 4, 7, 9), (9, 3, 13, 13), (13, 0, 17, 20)]),
    "negatives": lambda: PairLayout([(0, 3, 6, 8), (14, 2, 17, 20)], {0: [(3, 8, 11), (2, 11, 14), (3, 14, 14)]}),
    "rows": lambda: RowLayout(3, [5, 1, 8, 3], torch.device("cpu")),
    "rows without a prefix": lambda: RowLayout(0, [9, 11], torch.device("cpu")),
}


def run(layout, states):
    output = layout.attend(*states, 0.0, 0.3)
    return output, torch.autograd.grad(output.square().sum(), states)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_call_is_the_plain_way(name, states, monkeypatch):
    monkeypatch.setattr(varlen_attention, "_is_right", None)
    plain, gradients = run(LAYOUTS[name](), states)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(varlen_attention, "kernel_for", lambda query: counted)
    layout = LAYOUTS[name]()
    ours, found = run(layout, states)
    assert varlen_attention._is_right and len(calls) == 2  # the first call is compared with plain attention
    assert torch.allclose(ours, plain, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, gradients, strict=True))
    run(layout, states)
    assert len(calls) == 3
    layout.attend(*states, 0.1, 0.3)
    assert len(calls) == 3, "the kernel has no dropout"


@pytest.mark.parametrize(
    ("bad", "reason"), [(wrong_kernel, "its result differs"), (missing_kernel, "RuntimeError: no kernel")]
)
def test_a_kernel_that_is_wrong_or_does_not_run_is_left_alone(bad, reason, states, monkeypatch, caplog):
    monkeypatch.setattr(varlen_attention, "_is_right", None)
    plain, _ = run(LAYOUTS["pairs"](), states)
    monkeypatch.setattr(varlen_attention, "kernel_for", lambda query: bad)
    ours, _ = run(LAYOUTS["pairs"](), states)
    assert torch.equal(ours, plain) and varlen_attention._is_right is False
    assert f"torch's variable-length attention is not used: {reason}" in caplog.text


@pytest.mark.parametrize("name", ["rows", "rows without a prefix"])
def test_rows_one_by_one_are_those_of_the_padded_batch(name, states):
    batched = LAYOUTS[name]()
    batched.plain = batched.batched
    (ours, found), (padded, gradients) = run(LAYOUTS[name](), states), run(batched, states)
    assert torch.allclose(ours, padded, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, gradients, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_precision_on_a_cpu_is_that_of_fp32_rounded(name, states):
    half = [state.detach().bfloat16().requires_grad_() for state in states]
    wide = [state.detach().float().requires_grad_() for state in half]
    with torch.autocast("cpu", torch.bfloat16):
        ours, found = run(LAYOUTS[name](), half)
    expected, gradients = run(LAYOUTS[name](), wide)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, expected.bfloat16())
    # The sum of squares of the rounded output differs a little.
    assert all(torch.allclose(a.float(), b, atol=0.05, rtol=0.05) for a, b in zip(found, gradients, strict=True))


def test_there_is_no_kernel_on_a_cpu(states):
    assert varlen_attention.kernel_for(states[0].half()) is None

"""The scans of Mamba-1 and Mamba-2 compared with plain loops: values, gradients, memory."""

import pytest
import torch

from empathic import scan_empathic
from empathic.scan_empathic import selective_scan, ssd_scan


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scan_inputs(batch=3, length=13, inner=5, state=4, dtype=torch.float64):
    u, B, C, h = (
        torch.randn(batch, *shape, dtype=dtype)
        for shape in ((length, inner), (length, state), (length, state), (inner, state))
    )
    delta = torch.rand(batch, length, inner, dtype=dtype)
    A = -4 * torch.rand(inner, state, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (u, delta, A, B, C, h)]


def naive_scan(u, delta, A, B, C, h):
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 50])
@pytest.mark.parametrize("elements", [1, 1 << 19])  # 1: one row per block
def test_scan_equals_a_plain_loop(chunk_size, elements, monkeypatch):
    monkeypatch.setattr(scan_empathic, "_CPU_BLOCK_ELEMENTS", elements)
    inputs = scan_inputs()
    y, final = selective_scan(*inputs, chunk_size=chunk_size)
    expected_y, expected_final = naive_scan(*inputs)
    assert torch.allclose(y, expected_y, atol=1e-12)
    assert torch.allclose(final, expected_final, atol=1e-12)
    weights = torch.randn_like(y), torch.randn_like(final)
    grads = torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), inputs)
    expected = torch.autograd.grad((expected_y * weights[0]).sum() + (expected_final * weights[1]).sum(), inputs)
    for name, grad, wanted in zip("u delta A B C initial_state".split(), grads, expected, strict=True):
        assert torch.allclose(grad, wanted, atol=1e-12), name


def test_scan_gradcheck():
    inputs = scan_inputs(batch=2, length=7, inner=3, state=2)
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, chunk_size=3), inputs)
    # one of the results is unused
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, chunk_size=3)[1], inputs)


def test_scan_with_zero_steps_leaves_the_state_bit_for_bit():
    u, delta, A, B, C, h = scan_inputs(dtype=torch.float32)
    delta = torch.cat([delta[:, :5], torch.zeros_like(delta[:, 5:])], 1)
    _, final = selective_scan(u, delta, A, B, C, h)
    _, short = selective_scan(u[:, :5], delta[:, :5], A, B[:, :5], C[:, :5], h)
    assert torch.equal(final, short)
    assert torch.equal(selective_scan(u, torch.zeros_like(u), A, B, C, h)[1], h)


def test_scan_is_stable_where_decays_underflow():
    u, delta, A, B, C, h = (tensor.detach() for tensor in scan_inputs(length=600, dtype=torch.float32))
    args = (u, delta * 50, A * 50, B, C)
    for tensor in (*args, h):
        tensor.requires_grad_()
    y, final = selective_scan(*args, h)
    grads = torch.autograd.grad(y.sum() + final.sum(), (*args, h))
    wide = [tensor.double() for tensor in (*args, h)]
    assert torch.allclose(y.double(), naive_scan(*wide)[0], rtol=1e-4, atol=1e-3)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_scan_refuses_shapes_that_do_not_fit():
    u, delta, A, B, C, h = scan_inputs()
    with pytest.raises(ValueError, match="must have the shapes"):
        selective_scan(u, delta[:, 1:], A, B, C, h)
    with pytest.raises(ValueError, match="must have the shapes"):
        selective_scan(u, delta, A, B, C, h[:1])


def saved_elements(function):
    """Count the elements of all tensors that autograd keeps for backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(kept.values())


def test_scan_keeps_its_inputs_and_few_states():
    batch, length, inner, state = 2, 256, 64, 16
    inputs = scan_inputs(batch, length, inner, state, torch.float32)
    own = saved_elements(lambda: selective_scan(*inputs, chunk_size=32))
    given = sum(tensor.numel() for tensor in inputs)
    assert own <= given + (length // 32) * batch * inner * state
    # Negative control: the plain loop keeps several expanded tensors of this size.
    assert saved_elements(lambda: naive_scan(*inputs)) > 2 * batch * length * inner * state


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 64])
@pytest.mark.parametrize("carried", [False, True])
def test_ssd_scan_equals_the_selective_scan(chunk_size, carried):
    """Mamba-2 is Mamba-1 with one decay per head and with B, C shared by the heads of a group."""
    batch, length, heads, width, groups, state = 2, 13, 4, 3, 2, 5
    u = torch.randn(batch, length, heads, width, dtype=torch.float64)
    delta = torch.rand(batch, length, heads, dtype=torch.float64)
    A = -torch.rand(heads, dtype=torch.float64)
    B, C = (torch.randn(batch, length, groups, state, dtype=torch.float64) for _ in range(2))
    start = torch.randn(batch, heads, width, state, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (u, delta, A, B, C, start)]
    y, final = ssd_scan(u, delta, A, B, C, start if carried else None, chunk_size)
    wanted_y, wanted_final = torch.empty_like(y), torch.empty_like(final)
    for head in range(heads):
        h = start[:, head] if carried else None
        steps = delta[:, :, head, None].expand(-1, -1, width)
        decay = A[head].expand(width, state)
        group = head // (heads // groups)
        head_y, head_final = selective_scan(u[:, :, head], steps, decay, B[:, :, group], C[:, :, group], h)
        wanted_y[:, :, head], wanted_final[:, head] = head_y, head_final
    assert torch.allclose(y, wanted_y, atol=1e-12)
    assert torch.allclose(final, wanted_final, atol=1e-12)
    leaves = leaves if carried else leaves[:-1]
    grads = torch.autograd.grad(y.square().sum() + final.sum(), leaves)
    for grad, wanted in zip(
        grads, torch.autograd.grad(wanted_y.square().sum() + wanted_final.sum(), leaves), strict=True
    ):
        assert torch.allclose(grad, wanted, atol=1e-10)


def test_compiling_does_not_unroll_the_scan():
    graphs = []

    def backend(graph, example_inputs):
        graphs.extend(len(m.graph.nodes) for m in graph.modules() if isinstance(m, torch.fx.GraphModule))
        return graph.forward

    def layer(u, *rest):
        return selective_scan(u + 1, *rest)[0] * 2

    compiled, sizes = torch.compile(layer, backend=backend, dynamic=False), []
    for length in (5, 40):
        inputs = scan_inputs(length=length)
        graphs.clear()
        y, wanted = compiled(*inputs), layer(*inputs)
        sizes.append(sum(graphs))
        assert torch.equal(y, wanted)
        grads = torch.autograd.grad(y.square().sum(), inputs)
        for grad, expected in zip(grads, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
            assert torch.equal(grad, expected)
    assert 0 < sizes[0] == sizes[1]

"""The choice of the memory encoder's kernels, with stand-ins on a CPU: a folder that the package `kernels` loads as if
it came from the Hub, and modules with the names of mamba-ssm and causal-conv1d. No kernel for a GPU runs here; the
stand-ins have their signatures and limits, and compute the recurrences one step after the other."""

import json
import logging
import os
import sys
import types

import pytest
import torch
from transformers.integrations import hub_kernels

from empathic import kernels_empathic
from empathic.kernels_empathic import CONVOLUTION, EXACT, SCAN, SSD, kernel_source, without_kernels
from empathic.memory_empathic import MambaCompressor
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.trainers.packing.shared_prefix import PairLayout, enable_pair_layouts, why_not_packed

sys.path.append(os.path.dirname(__file__))
from test_memory_empathic import (
    KINDS,
    MEM,
    WIDTH,
    compressor,
    config_of,
    conversation,
    one_thread_and_seed,  # noqa: F401
    with_adapter,
)

HUB = "the Hub's kernels-community/mamba-ssm"
FUNCTIONS = '''
import torch
import torch.nn.functional as F

calls = []
spoiled = set()


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    """(batch, inner, length), (inner, state), (batch, state, length); starts from zero; the state has no gradient."""
    calls.append("selective_scan_fn")
    assert u.dtype == delta.dtype == B.dtype == C.dtype and A.dtype == torch.float32
    assert all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in (u, delta, B, C))
    state, outputs = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        state = state * torch.exp(delta[:, :, t, None] * A) + (delta * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, 2) + ("selective_scan_fn" in spoiled)
    return (y, state.detach()) if return_last_state else y


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):
    """(batch, length, heads, head_dim), (batch, length, heads), (heads,), (batch, length, groups, state)."""
    calls.append("mamba_chunk_scan_combined")
    assert x.dtype == B.dtype == C.dtype == torch.bfloat16 and x.is_contiguous()
    heads = x.shape[2]
    B, C = (tensor.float().repeat_interleave(heads // tensor.shape[2], 2) for tensor in (B, C))
    state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3], dtype=torch.float32)
    state = state if initial_states is None else initial_states
    outputs = []
    for t in range(x.shape[1]):
        drive = (dt[:, t, :, None] * x[:, t].float())[..., None] * B[:, t, :, None]
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + drive
        outputs.append((state * C[:, t, :, None]).sum(-1))
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def causal_conv1d_fn(x, weight, bias=None, activation=None, **kwargs):
    calls.append("causal_conv1d_fn")
    assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == 0 and activation == "silu"
    taps = weight.shape[1]
    out = F.conv1d(F.pad(x, (taps - 1, 0)).to(weight.dtype), weight[:, None], bias, groups=weight.shape[0])
    return F.silu(out).to(x.dtype)
'''
# The Hub's kernel wraps its functions in modules.
LAYERS = """
from torch import nn

from . import functions


def layer(name):
    class Layer(nn.Module):
        def forward(self, *args, **kwargs):
            return getattr(functions, name)(*args, **kwargs)

    return Layer


selective_scan_fn, mamba_chunk_scan_combined, causal_conv1d_fn = map(
    layer, ("selective_scan_fn", "mamba_chunk_scan_combined", "causal_conv1d_fn")
)
"""


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch):
    """Treat the CPU as a GPU, without any source."""
    for name in ("kernels", "mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(kernels_empathic, "_on_gpu", lambda device: True)
    monkeypatch.setattr(kernels_empathic.logger, "warning_once", kernels_empathic.logger.warning)
    monkeypatch.delenv("USE_HUB_KERNELS", raising=False)
    for cached in (kernels_empathic._choose, kernels_empathic._hub_layers):
        cached.cache_clear()
    yield
    for cached in (kernels_empathic._choose, kernels_empathic._hub_layers):
        cached.cache_clear()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's kernel as a folder that the real package `kernels` loads. Returns the stand-in's functions."""
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    kernels = pytest.importorskip("kernels")
    variant = tmp_path / "build" / "torch-cpu"
    variant.mkdir(parents=True)
    name = f"stand_in_{tmp_path.name}".replace("-", "_")
    metadata = {"id": name, "name": "mamba-ssm", "version": 5, "license": "Apache-2.0", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text("from . import functions, layers\n")
    (variant / "functions.py").write_text(FUNCTIONS)
    (variant / "layers.py").write_text(LAYERS)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/mamba-ssm={tmp_path}")
    return kernels.get_kernel("kernels-community/mamba-ssm", version=5).functions


@pytest.fixture
def packages(monkeypatch):
    """mamba-ssm and causal-conv1d as modules. Returns their functions."""
    functions = types.ModuleType("functions")
    exec(FUNCTIONS, functions.__dict__)
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    for name in kernels_empathic.PACKAGES.values():
        monkeypatch.setitem(sys.modules, name, functions)
    return functions


def recurrence(kind):
    return SCAN if kind == "mamba" else SSD


def model_of(kind):
    """Mamba-2's kernel runs in half precision."""
    model = compressor(kind)
    return model if kind == "mamba" else model.to(torch.bfloat16)


def far(found, wanted):
    """The root mean square of the difference, relative to that of the wanted tensor."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def tolerance(kind):
    return 1e-4 if kind == "mamba" else 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_the_hub_come_first_and_the_log_says_so_once(kind, hub, packages, caplog):
    model, ids = model_of(kind), conversation(2, 30)
    with without_kernels():
        wanted = model(ids)
    assert not hub.calls
    with caplog.at_level(logging.WARNING):
        vectors = model(ids)
    assert {recurrence(kind), CONVOLUTION} <= set(hub.calls) and not packages.calls
    assert far(vectors, wanted) < tolerance(kind)
    lines = {record.getMessage() for record in caplog.records}
    assert lines == {f"The memory encoder's recurrence runs by {HUB}, its convolution by {HUB}."}
    assert kernel_source(recurrence(kind), torch.device("cpu")) == HUB


@pytest.mark.parametrize("kind", KINDS)
def test_packages_are_used_without_the_hub(kind, packages, caplog):
    model, ids = model_of(kind), conversation(2, 30)
    with without_kernels():
        wanted = model(ids)
    with caplog.at_level(logging.WARNING):
        assert far(model(ids), wanted) < tolerance(kind)
    assert {recurrence(kind), CONVOLUTION} <= set(packages.calls)
    assert "recurrence runs by mamba_ssm, its convolution by causal_conv1d." in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_source_the_exact_code_runs_and_the_log_says_why(kind, caplog):
    model, ids = model_of(kind), conversation(2, 30)
    with without_kernels():
        wanted = model(ids)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(ids), wanted)
    assert "recurrence runs by PyTorch, its convolution by PyTorch. (Not used: " in caplog.text
    assert "kernels" in caplog.text and "mamba_ssm" in caplog.text and "causal_conv1d" in caplog.text


def test_the_hub_can_be_switched_off(hub, packages, monkeypatch):
    monkeypatch.setenv("USE_HUB_KERNELS", "NO")
    hub.calls.clear()
    assert kernel_source(SCAN, torch.device("cpu")) == "mamba_ssm"
    assert not hub.calls


def test_a_kernel_that_computes_something_else_is_left(hub, packages, caplog):
    hub.spoiled.add(SCAN)
    model, ids = model_of("mamba"), conversation(2, 30)
    with without_kernels():
        wanted = model(ids)
    with caplog.at_level(logging.WARNING):
        assert far(model(ids), wanted) < 1e-4
    assert f"runs by mamba_ssm, its convolution by {HUB}." in caplog.text
    packages.spoiled.add(SCAN)
    kernels_empathic._choose.cache_clear()
    assert kernel_source(SCAN, torch.device("cpu")) == EXACT
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model(ids)
    assert "differs from the exact code by" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_in_any_cuts_equals_one_pass_with_kernels(kind, hub, monkeypatch):
    monkeypatch.setattr(kernels_empathic, "_BLOCK_ELEMENTS", 512)  # a carried state is added in several blocks
    model, ids = model_of(kind), conversation(2, 60)
    mask = torch.ones_like(ids)
    mask[1, 41:] = 0
    with without_kernels():
        exact_state = model.new_state(2)
        wanted = model(ids, mask)
        model.append(exact_state, ids, mask)
    hub.calls.clear()
    state, pieces = model.new_state(2), []
    for first, last in ((0, 7), (7, 8), (8, 41), (41, 60)):
        pieces.append(model.append(state, ids[:, first:last], mask[:, first:last]))
    assert {recurrence(kind), CONVOLUTION} <= set(hub.calls)
    whole = model(ids, mask)
    streamed = torch.cat(pieces)
    assert streamed.shape == wanted.shape
    assert far(streamed.sort(0)[0], wanted.sort(0)[0]) < tolerance(kind)
    assert far(whole, wanted) < tolerance(kind)
    assert far(state.ssm, exact_state.ssm) < tolerance(kind)
    assert far(state.conv, exact_state.conv) < tolerance(kind)


def test_appends_of_padding_alone_leave_the_state_exactly_as_it_was(hub):
    model = model_of("mamba")
    state = model.new_state(2)
    model.append(state, conversation(2, 20))
    before = state.fork()
    ids = conversation(2, 6)
    mask = torch.ones_like(ids)
    mask[1] = 0
    model.append(state, ids, mask)
    assert torch.equal(state.ssm[:, 1], before.ssm[:, 1])
    assert not torch.equal(state.ssm[:, 0], before.ssm[:, 0])


def test_gradients_with_kernels_are_those_of_the_exact_code(hub):
    model, ids = model_of("mamba").train(), conversation(3, 20)
    mask = (torch.arange(20) < torch.tensor([20, 7, 13])[:, None]).long()

    def gradients():
        model.zero_grad()
        model(ids, mask).square().cumsum(-1).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with without_kernels():
        wanted = gradients()
    hub.calls.clear()
    found = gradients()
    assert SCAN in hub.calls
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


def test_double_and_single_precision_are_left_to_the_exact_code_where_a_kernel_would_round(hub):
    ids = conversation(1, 30)
    compressor("mamba", torch.float64)(ids)
    compressor("mamba2", torch.float64)(ids)
    assert not hub.calls
    compressor("mamba2")(ids)
    assert SSD not in hub.calls


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize("layer", ["conv1d", "out_proj", "dt_proj"])
def test_adapters_act_beside_kernels(layer, hub):
    plain, adapted = with_adapter("mamba", layer)
    ids = conversation(1, 30)
    with without_kernels():
        wanted = adapted(ids)
    hub.calls.clear()
    assert far(adapted(ids), wanted) < 1e-4
    assert far(plain(ids), wanted) > 1e-3
    adapted(ids)
    assert hub.calls.count(CONVOLUTION) > 0 or layer == "conv1d"


def test_other_convolutions_and_activations_are_left_to_the_exact_code(hub):
    ids = conversation(1, 20)
    for changes in ({"hidden_act": "relu"}, {"conv_kernel": 5}, {"hidden_size": 6, "num_hidden_layers": 1}):
        model = MambaCompressor(config_of("mamba", **changes), WIDTH, MEM, 0.5).eval()
        with without_kernels():
            wanted = model(ids)
        hub.calls.clear()
        assert far(model(ids), wanted) < 1e-4
        # Choosing a recurrence runs the convolution's example once: it has 32 channels, and this model fewer.
        assert hub.calls.count(CONVOLUTION) <= 1


def test_inference_mode_can_come_first(hub):
    model, ids = model_of("mamba"), conversation(1, 20)
    with torch.inference_mode():
        model(ids)
    assert kernel_source(SCAN, torch.device("cpu")) == HUB


# -------------------------------------------------------------------------------------------------- attention kernels

ATTENTION = '''
import torch
from torch.nn.functional import scaled_dot_product_attention

calls = []


def attend(q, k, v, scale, causal):
    """(length, heads, width); a causal mask is aligned at the end of the keys."""
    k, v = (states.repeat_interleave(q.shape[1] // states.shape[1], 1) for states in (k, v))
    mask = torch.ones(len(q), len(k), dtype=torch.bool)
    mask = mask.tril(len(k) - len(q)) if causal else mask
    out = scaled_dot_product_attention(*(states.transpose(0, 1) for states in (q, k, v)), attn_mask=mask, scale=scale)
    return out.transpose(0, 1)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    deterministic=False):
    calls.append("flash_attn_func")
    return torch.stack([attend(*row, softmax_scale, causal) for row in zip(q, k, v)])


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):
    calls.append("flash_attn_varlen_func")
    queries, keys = (bounds.tolist() for bounds in (cu_seqlens_q, cu_seqlens_k))
    return torch.cat([
        attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal)
        for a, b, c, d in zip(queries, queries[1:], keys, keys[1:])
    ])
'''


def test_attention_can_be_a_kernel_of_the_hub(hub, tmp_path_factory, base_folder, model, processor, clip, monkeypatch):
    """transformers decides by version whether it uses the package `kernels`; its checks are answered with yes here, and
    everything else is its own code."""
    kernels = sys.modules["kernels"]
    folder = tmp_path_factory.mktemp("attention")
    variant = folder / "build" / "torch-cpu"
    variant.mkdir(parents=True)
    name = f"stand_in_{folder.name}".replace("-", "_")
    metadata = {"id": name, "name": "flash-attn2", "version": 3, "license": "BSD-3-Clause", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    (variant / "__init__.py").write_text(ATTENTION)
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={folder}")
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *args, **kw: True)
    monkeypatch.setattr(
        hub_kernels, "get_kernel", lambda id, version=None, **kw: kernels.get_kernel(id, version=version)
    )

    implementation = "kernels-community/flash-attn2"
    loaded = EmpathicForConditionalGeneration.from_pretrained(base_folder, attn_implementation=implementation)
    body = loaded.model
    for part in (body.language_model, body.vision_tower, body.audio_tower):
        assert part.config._attn_implementation == implementation
    for part in (body.video_qformer, body.audio_qformer):
        assert part.config._attn_implementation == "sdpa"
    calls = kernels.get_kernel(implementation, version=3).calls
    turn = [{"type": kind, "path": clip} for kind in ("audio", "video")] + [{"type": "text", "text": "hello there"}]
    conversations = [
        [{"role": "user", "content": "hello"}, {"role": "user", "content": turn}],
        [{"role": "user", "content": "hi"}],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    batch = processor.apply_chat_template(conversations, add_generation_prompt=True, **options)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        found, wanted = loaded(**batch).logits, model(**batch).logits
    assert calls
    assert torch.allclose(found[real], wanted[real], atol=2e-5)

    enable_pair_layouts()
    assert why_not_packed(body.language_model) is None
    inputs = {"input_ids": torch.arange(4, 14)[None], "position_ids": torch.arange(10)[None]}
    layout = PairLayout([(0, 4, 7, 10)])
    calls.clear()
    with torch.no_grad():
        body.language_model(**inputs, pair_layout=layout, use_cache=False)
    assert layout.attended == loaded.config.text_config.num_hidden_layers
    assert layout.obstacle is None and not calls

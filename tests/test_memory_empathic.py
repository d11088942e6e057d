"""The memory encoder: its layers compared with transformers' layers, and streams with one pass."""

import copy
import random
from inspect import signature

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModel, DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from empathic import memory_empathic
from empathic.compat_empathic import MAMBA_CACHE
from empathic.memory_empathic import MambaCompressor, MemoryState, Projector
from empathic.trainers.compat import enable_activation_checkpointing

VOCABULARY, MEM, WIDTH = 50, 50, 24  # <MEM> is beyond the token table
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
KINDS = ["mamba", "mamba2"]


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def config_of(kind, **changes):
    if kind == "mamba":
        settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 3}
        return MambaConfig(**(settings | changes))
    settings = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 3}
    # transformers before 5.23, which is compared with, normalizes the groups together; test_versions.py has two there.
    groups = 2 if "group_size" in signature(modeling_mamba2.MambaRMSNormGated).parameters else 1
    settings |= {"num_heads": 4, "head_dim": 8, "n_groups": groups, "chunk_size": 8}
    return Mamba2Config(**(settings | changes))


def compressor(kind, dtype=torch.float32, **changes):
    """Use larger weights and time steps than at initialization, so that the past affects every output."""
    model = MambaCompressor(config_of(kind, **changes), WIDTH, MEM, 0.5).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.mamba.named_parameters():
            if name.endswith(("dt_proj.bias", "dt_bias")):
                parameter.uniform_(-2, 1)
            elif "conv1d" in name or name.endswith(("in_proj.weight", "x_proj.weight")):
                parameter.normal_(std=0.4)
    return model


def conversation(batch, length, mem_every=6):
    ids = torch.randint(VOCABULARY, (batch, length))
    ids[torch.rand(batch, length) < 1 / mem_every] = MEM
    ids[:, -1] = MEM
    return ids


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


# ----------------------------------------------------------------------------------------------- against transformers


def plain_outputs(model, ids, mask=None):
    """transformers' model with the layers of memory_empathic, using the plain token table."""
    real = None if mask is None else mask.bool()
    carried = memory_empathic._Pass(real, None, model.config.num_hidden_layers)
    return model.mamba(ids, use_cache=False, **{MAMBA_CACHE: carried}).last_hidden_state


def reference_of(model):
    """The original transformers model with the same weights."""
    reference = AutoModel.from_config(model.config).to(model.mem_embedding.dtype).eval()
    reference.load_state_dict(model.mamba.state_dict(), strict=True)
    assert all(type(layer.mixer) in (MambaMixer, Mamba2Mixer) for layer in reference.layers)
    return reference


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3}])
def test_full_pass_equals_transformers(kind, changes):
    model = compressor(kind, **changes)
    reference = reference_of(model)
    ids = torch.randint(VOCABULARY, (2, 37))
    outputs, expected = plain_outputs(model, ids), reference(ids, use_cache=False).last_hidden_state
    assert (outputs - expected).abs().max() < 5e-5 < 1 < expected.abs().max()
    weights = torch.randn_like(expected)
    (outputs * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, own), other in zip(model.mamba.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-3, atol=1e-3 * other.grad.abs().max().item()), name


@pytest.mark.parametrize("kind", KINDS)
def test_mixers_outside_a_compressor_pass_stay_transformers_own(kind):
    model = compressor(kind)
    ids = torch.randint(VOCABULARY, (2, 9))
    assert torch.equal(model.mamba(ids).last_hidden_state, reference_of(model)(ids).last_hidden_state)


def test_time_step_limit_above_zero_does_not_reach_padding():
    model = compressor("mamba2", torch.float64, time_step_limit=(0.05, 0.2))
    reference = reference_of(compressor("mamba2", time_step_limit=(0.05, 0.2)))
    reference.load_state_dict(model.mamba.state_dict())
    ids = torch.randint(VOCABULARY, (1, 20))
    outputs = plain_outputs(model, ids)
    assert torch.allclose(outputs.float(), reference(ids).last_hidden_state, atol=1e-5)
    state, padded = model.new_state(), model.new_state()
    model.append(state, ids)
    model.append(padded, torch.cat([ids, ids], 1), torch.arange(40)[None] < 20)
    assert torch.allclose(state.ssm, padded.ssm, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_transformers(kind):
    model = compressor(kind)
    own = {name: tensor.shape for name, tensor in model.mamba.state_dict().items()}
    assert own == {name: t.shape for name, t in AutoModel.from_config(config_of(kind)).state_dict().items()}
    rest = {name for name in model.state_dict() if not name.startswith("mamba.")}
    assert rest == {"mem_embedding", "projector.linear.weight", "projector.linear.bias", "projector.scale"}
    # FSDP and device maps look layers up by these names.
    assert set(model.mamba._no_split_modules) <= {type(module).__name__ for module in model.modules()}


# ------------------------------------------------------------------------------------------------ batches and streams


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_padded_batch_equals_its_rows(kind, dtype):
    model = compressor(kind, dtype)
    ids = conversation(4, 23)
    lengths = torch.tensor([23, 11, 1, 0])
    mask = (torch.arange(23) < lengths[:, None]).long()
    ids[mask == 0] = MEM  # even a masked <MEM> is ignored
    ids[2, 0] = MEM
    rows = [model(row[None, :n]) for row, n in zip(ids, lengths.tolist(), strict=True)]
    assert [len(row) for row in rows][2:] == [1, 0]
    vectors = model(ids, mask)
    assert torch.allclose(vectors, torch.cat(rows), atol=TOLERANCE[dtype])
    out_of_range = torch.where(mask.bool(), ids, -100)  # masked ids may even be out of range
    assert torch.equal(model(out_of_range, mask), vectors)


def cuts(length, seed):
    """Cut into random pieces of one or more tokens."""
    rng = random.Random(seed)
    start = 0
    while start < length:
        size = rng.choice([0, 1, 1, 2, 3, 5, 20])
        yield start, min(length, start + size)
        start += size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stream_in_any_cuts_equals_one_pass(kind, dtype):
    model = compressor(kind, dtype)
    ids = conversation(2, 90)
    whole = model(ids).split((ids == MEM).sum(1).tolist())
    assert min(len(row) for row in whole) > 5
    for seed in range(4):
        state = model.new_state(batch_size=2)
        pieces = ([], [])
        for start, stop in cuts(90, seed):
            piece = ids[:, start:stop]
            vectors = model.append(state, piece)
            assert vectors.shape == ((piece == MEM).sum(), WIDTH)
            assert not vectors.requires_grad
            for row, part in zip(pieces, vectors.split((piece == MEM).sum(1).tolist()), strict=True):
                row.append(part)
        for row, expected in zip(pieces, whole, strict=True):
            assert torch.allclose(torch.cat(row), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_cut_between_the_mems_of_an_utterance_changes_nothing(kind, dtype):
    """Several <MEM> in a row, as utterances of several vectors have them, cut at every place."""
    model = compressor(kind, dtype)
    words = torch.randint(VOCABULARY, (1, 7))
    ids = torch.cat([words, torch.full((1, 5), MEM), words, torch.full((1, 2), MEM)], dim=1)
    whole = model(ids)
    assert len(whole) == 7
    assert (whole[:-1] - whole[1:]).abs().amax(1).min() > 1e-3  # each <MEM> of a row gives a vector of its own
    for cut in range(1, ids.shape[1]):
        state = model.new_state()
        pieces = [model.append(state, piece) for piece in ids.split([cut, ids.shape[1] - cut], dim=1)]
        assert torch.allclose(torch.cat(pieces), whole, atol=TOLERANCE[dtype], rtol=0), cut
    state = model.new_state()
    pieces = [model.append(state, piece) for piece in ids.split(1, dim=1)]
    assert torch.allclose(torch.cat(pieces), whole, atol=TOLERANCE[dtype], rtol=0)


def test_transformers_own_continuation_would_fail_the_stream_test():
    """Negative control: on this data, a dropped recurrent state or conv state is far outside the tolerances."""
    model = compressor("mamba")
    ids = torch.randint(VOCABULARY, (1, 60))
    reference = reference_of(model)
    whole = reference(ids, use_cache=False).last_hidden_state
    cache = DynamicCache(config=model.config)
    reference(ids[:, :30], use_cache=True, **{MAMBA_CACHE: cache})
    assert (
        reference(ids[:, 30:], use_cache=True, **{MAMBA_CACHE: cache}).last_hidden_state - whole[:, 30:]
    ).abs().max() > 0.1
    talk = conversation(1, 60)
    expected = model(talk)[-1]
    for part in ("conv", "ssm"):
        state = model.new_state()
        model.append(state, talk[:, :58])
        getattr(state, part).zero_()
        assert (model.append(state, talk[:, 58:])[-1] - expected).abs().max() > 0.01, part


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_appends_equal_one_pass(kind, dtype):
    model = compressor(kind, dtype)
    ids = conversation(3, 60)
    whole = [model(row[None]) for row in ids]
    generator = torch.Generator().manual_seed(1)
    state, done, pieces = model.new_state(3), torch.zeros(3, dtype=torch.long), ([], [], [])
    while (done < 60).any():
        new = torch.minimum(torch.randint(8, (3,), generator=generator), 60 - done)
        width = max(1, int(new.max()))  # also a single column if some rows have no new tokens
        piece = torch.zeros(3, width, dtype=torch.long)
        mask = torch.arange(width) < new[:, None]
        for row in range(3):
            piece[row, : new[row]] = ids[row, done[row] : done[row] + new[row]]
        before = state.fork()
        parts = model.append(state, piece, mask.long()).split(((piece == MEM) & mask).sum(1).tolist())
        for row, part in enumerate(parts):
            pieces[row].append(part)
            if new[row] == 0:
                assert torch.equal(state.conv[:, row], before.conv[:, row])
                assert torch.equal(state.ssm[:, row], before.ssm[:, row])
        done += new
    for row, expected in zip(pieces, whole, strict=True):
        assert torch.allclose(torch.cat(row), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_state_does_not_grow_and_empty_appends_change_nothing(kind):
    model = compressor(kind)
    state = model.new_state()
    model.append(state, conversation(1, 5))
    size = state.conv.numel() + state.ssm.numel()
    model.append(state, conversation(1, 80))
    assert state.conv.numel() + state.ssm.numel() == size
    before = state.fork()
    assert model.append(state, torch.zeros(1, 0, dtype=torch.long)).shape == (0, WIDTH)
    assert torch.equal(state.conv, before.conv)
    assert torch.equal(state.ssm, before.ssm)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_are_independent(kind):
    model = compressor(kind)
    past, one, other = conversation(1, 20), conversation(1, 12), conversation(1, 15)
    state = model.new_state()
    model.append(state, past)
    fork = state.fork()
    of_fork = model.append(fork, one)
    of_state = model.append(state, other)
    assert torch.allclose(of_fork, model(torch.cat([past, one], 1))[-len(of_fork) :], atol=1e-5)
    assert torch.allclose(of_state, model(torch.cat([past, other], 1))[-len(of_state) :], atol=1e-5)
    fork = state.fork()
    conv, ssm = state.conv.clone(), state.ssm.clone()
    state.conv.zero_()
    state.ssm.zero_()
    assert torch.equal(fork.conv, conv)
    assert torch.equal(fork.ssm, ssm)


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_go_on_alone(kind):
    model = compressor(kind)
    past, more = conversation(3, 20), conversation(3, 9)
    state = model.new_state(3)
    model.append(state, past)
    before = state.fork()
    chosen = state.select([2, 0, 2])
    more[2, -2] = 3  # the two copies of row 2 continue differently
    vectors = model.append(chosen, more).split((more == MEM).sum(1).tolist())
    for row, origin in enumerate((2, 0, 2)):
        whole = model(torch.cat([past[origin], more[row]])[None])
        assert torch.allclose(vectors[row], whole[-len(vectors[row]) :], atol=1e-5)
    assert torch.equal(state.conv, before.conv)
    assert torch.equal(state.ssm, before.ssm)
    chosen = state.select(torch.tensor([1]))
    state.ssm.zero_()
    assert torch.equal(chosen.ssm, before.ssm[:, 1:2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_utterances_stay_exact_at_the_same_size(kind):
    """Compare one append per utterance in float32 with one pass in float64."""
    model = compressor(kind, num_hidden_layers=2)
    lengths = torch.randint(1, 7, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    utterances = [torch.tensor([[*torch.randint(VOCABULARY, (length,)).tolist(), MEM]]) for length in lengths]
    state = model.new_state()
    size = sum(tensor.untyped_storage().nbytes() for tensor in state.state_dict().values())
    vectors = torch.cat([model.append(state, utterance) for utterance in utterances])
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.state_dict().values()) == size
    with torch.no_grad():
        exact = model.double()(torch.cat(utterances, dim=1))
    assert vectors.shape == exact.shape == (1000, WIDTH)
    assert (vectors - exact).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, tmp_path):
    model = compressor(kind)
    state = model.new_state(2)
    model.append(state, conversation(2, 20))
    torch.save(state.state_dict(), tmp_path / "state.pt")
    loaded = model.new_state(2)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    more = conversation(2, 9)
    assert torch.equal(model.append(loaded, more), model.append(state, more))
    with pytest.raises(ValueError, match="batch size"):
        model.new_state(3).load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="same model and the same batch size"):
        loaded.load_state_dict({"conv": state.conv})


def test_state_moves_between_dtypes_in_place():
    state = MemoryState(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 4))
    assert state.to(torch.float64) is state
    assert (state.conv.dtype, state.ssm.dtype) == (torch.float64, torch.float64)
    state.to("cpu", torch.bfloat16)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert (state.batch_size, state.device) == (2, torch.device("cpu"))


def with_adapter(kind, layer):
    """A compressor, and the same one with a random adapter on a layer of its mixers."""
    plain = compressor(kind)
    model = copy.deepcopy(plain)
    rank = model.mamba.layers[0].mixer.conv1d.groups if layer == "conv1d" else 2  # PEFT's condition
    config = LoraConfig(r=rank, target_modules=[layer], init_lora_weights=False)
    inject_adapter_in_model(config, nn.ModuleDict({"memory": model}))  # in a Mamba model PEFT refuses some layers
    return plain, model


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_the_convolution_acts_and_learns_in_a_pass_and_in_a_stream(kind):
    plain, adapted = with_adapter(kind, "conv1d")
    ids = conversation(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    vectors = adapted(ids, mask)
    vectors.square().sum().backward()
    assert all(p.grad.any() for name, p in adapted.named_parameters() if "lora_" in name)
    state = adapted.new_state(2)
    pieces = [adapted.append(state, ids[:, cut], mask[:, cut]) for cut in (slice(7), slice(7, 13), slice(13, 30))]
    assert torch.allclose(torch.cat(pieces).sort(0)[0], vectors.sort(0)[0], atol=1e-4)
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    without = adapted(ids, mask)
    assert not torch.allclose(vectors, without, atol=1e-3)
    assert torch.allclose(without, plain(ids, mask), atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the whole module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(kind, use_reentrant):
    model = compressor(kind).train()
    ids = conversation(3, 20)
    mask = (torch.arange(20) < torch.tensor([20, 7, 13])[:, None]).long()

    def run():
        model.zero_grad()
        vectors = model(ids, mask)
        vectors.square().cumsum(-1).sum().backward()
        return vectors.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    vectors, grads = run()
    kept = saved_elements(lambda: model(ids, mask))
    enable_activation_checkpointing(model.mamba, {"use_reentrant": use_reentrant})
    assert saved_elements(lambda: model(ids, mask)) < kept / 3
    again, same = run()
    assert torch.equal(vectors, again)
    for name, grad in grads.items():
        assert torch.allclose(grad, same[name], atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_from_a_padded_batch(kind):
    model = compressor(kind).train()
    ids = conversation(3, 20)
    mask = (torch.arange(20) < torch.tensor([20, 7, 13])[:, None]).long()
    model(ids, mask).square().cumsum(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_float64_is_float64_all_the_way(kind):
    """Numerical gradients of the whole module, which any internal rounding to float32 would break, such as that of
    transformers' norms and residuals."""
    model = compressor(kind, torch.float64, num_hidden_layers=2)
    ids, mask = torch.tensor([[1, MEM, 2, 3, MEM], [4, 5, MEM, 0, 0]]), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])

    def run(embedding):
        return torch.func.functional_call(model, {"mem_embedding": embedding}, (ids, mask))

    assert torch.autograd.gradcheck(run, model.mem_embedding.detach().clone().requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_weights_and_autocast(kind):
    model = compressor(kind).train()
    ids = conversation(2, 30)
    exact = model(ids).detach()
    scale = exact.square().mean().sqrt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = model(ids)
        assert vectors.dtype == torch.float32
        assert (vectors - exact).square().mean().sqrt() < 0.1 * scale
        vectors.square().cumsum(-1).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    half = model.to(torch.bfloat16).eval()
    vectors = half(ids)
    assert vectors.dtype == torch.bfloat16
    assert (vectors.float() - exact).square().mean().sqrt() < 0.1 * scale
    state = half.new_state(2)
    half.append(state, ids)
    assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)


def test_mem_embedding_replaces_the_table_even_where_it_has_a_row():
    model = MambaCompressor(config_of("mamba"), WIDTH, 7, 0.5).eval()
    ids = torch.tensor([[3, 7, 4, 7]])
    before = model(ids)
    with torch.no_grad():
        model.mamba.embeddings.weight[7] += 1
    assert torch.equal(model(ids), before)
    with torch.no_grad():
        model.mem_embedding += 1
    assert not torch.allclose(model(ids), before, atol=1e-3)


def test_projector_has_unit_rms_times_its_scale():
    projector = Projector(16, 64, 0.3)
    vectors = projector(torch.randn(5, 16) * 100)
    assert torch.allclose(vectors.square().mean(-1).sqrt(), torch.full((5,), 0.3), atol=1e-3)
    assert projector(torch.zeros(0, 16)).shape == (0, 64)
    assert projector.to(torch.bfloat16)(torch.randn(5, 16)).dtype == torch.bfloat16


def test_initialisation_spares_what_was_loaded_and_fills_what_came_from_meta():
    with torch.device("meta"):
        model = MambaCompressor(config_of("mamba"), WIDTH, MEM, 0.5)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.projector.linear.bias.data.fill_(3.0)
    model.projector.linear.bias._is_hf_initialized = True
    model.init_parameters()
    model.projector.init_parameters()
    assert torch.isfinite(model.mem_embedding).all()
    assert torch.isfinite(model.projector.linear.weight).all()
    assert model.projector.scale.item() == 0.5
    assert (model.projector.linear.bias == 3.0).all()


def test_clear_errors():
    model = compressor("mamba")
    ids = conversation(2, 6)
    state = model.new_state(2)
    before = state.fork()
    left, hole = torch.ones(2, 6), torch.ones(2, 6)
    left[0, :2] = 0
    hole[1, 3] = 0
    for mask in (left, hole, torch.full((2, 6), 2)):
        with pytest.raises(ValueError, match="right-padded"):
            model.append(state, ids, mask)
    with pytest.raises(ValueError, match="Give both the same shape"):
        model(ids, torch.ones(2, 5))
    with pytest.raises(ValueError, match="batch size 3"):
        model.append(model.new_state(3), ids)
    for wrong in (VOCABULARY + 1, -1):
        bad = ids.clone()
        bad[1, 2] = wrong
        with pytest.raises(ValueError, match=f"contain {wrong}, .* vocabulary is {VOCABULARY - 1} "):
            model.append(state, bad)
    with pytest.raises(ValueError, match="integers"):
        model(ids.float())
    with pytest.raises(ValueError, match="integers"):
        model(ids[0])
    assert torch.equal(state.ssm, before.ssm)
    assert torch.equal(state.conv, before.conv)
    with pytest.raises(ValueError, match="gpt2"):
        MambaCompressor(AutoConfig.for_model("gpt2"), WIDTH, MEM, 0.5)
    with pytest.raises(ValueError, match="mem_token_id"):
        MambaCompressor(config_of("mamba"), WIDTH, None, 0.5)

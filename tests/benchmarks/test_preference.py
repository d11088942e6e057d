"""Tests of the preference benchmark: equal inputs for all trainers, counters, tables and output files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from empathic.benchmarks import preference, preference_anchors
from empathic.benchmarks.preference_anchors import FUSED, FUSED_REPLIES, LIGER, unavailable
from empathic.benchmarks.preference_sides import (
    CPO,
    DPO,
    LADDER,
    OURS,
    UNSHARED,
    Case,
    build,
    make_rows,
    make_sides,
    operations_of,
    preset,
)
from empathic.benchmarks.step_costs import (
    Side,
    largest_difference,
    median_seconds,
    norms_in_full,
    operations,
    watched_step,
)

RAGGED = Case("ragged", ((9, 3, 5), (4, 6, 2), (7, 2, 2)), vocabulary=50)


@pytest.fixture(scope="module")
def model():
    return build(preset("tiny"), RAGGED.vocabulary, "cpu")


def sides_of(model, case, folder, **options):
    return make_sides(model, case, make_rows(case), str(folder), **options)


# ---------------------------------------------------------------------------------------------------- both sides


def test_both_sides_are_given_the_same_tokens_and_weights(model, tmp_path):
    ours, theirs = sides_of(model, RAGGED, tmp_path)
    pairs = len(RAGGED.lengths)
    for number, (prompt, *replies) in enumerate(RAGGED.lengths):
        for place, (name, reply) in enumerate(zip(("chosen", "rejected"), replies, strict=True)):
            row = place * pairs + number
            kept = ours.batch["attention_mask"][row].bool()
            other = theirs.batch[f"{name}_attention_mask"][number].bool()
            assert kept.sum() == prompt + reply, "the length is not the stated one"
            for ids, other_ids in (("input_ids", f"{name}_input_ids"), ("labels", f"{name}_labels")):
                assert torch.equal(ours.batch[ids][row][kept], theirs.batch[other_ids][number][other])
            assert (ours.batch["labels"][row] != -100).sum() == reply
            assert ours.batch["labels"][row][kept].tolist().count(0) == 1  # one end token
    mine, other = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name])
        # Frozen weights are shared, so that a 7B model fits; trained weights are not, so that gradients are separate.
        assert (value is other[name]) == (".lora_" not in name) == (not value.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_agree(model, tmp_path, checkpointing):
    case = replace(RAGGED, checkpointing=checkpointing)
    sides = sides_of(model, case, tmp_path)
    _, single = preference.compare(sides)
    assert single["loss"] < 1e-5 and single["gradients"] < 1e-4
    assert len(sides[0].gradients()) == 2 * 7 * 2  # two matrices of seven linear layers of two blocks
    assert all(gradient.abs().max() > 0 for gradient in sides[0].gradients().values())
    with norms_in_full():
        sides = sides_of(copy.deepcopy(model).double(), case, tmp_path)
        _, double = preference.compare(sides)
        assert double["loss"] < 1e-12 and double["gradients"] < 1e-11 < 1e-3 < double["largest_gradient"]
        # A change that is too small for fp32 is detected.
        with torch.no_grad():
            next(value for value in sides[0].model.parameters() if value.requires_grad).mul_(1 + 1e-6)
        _, changed = preference.compare(sides)
        assert changed["gradients"] > 1e-8
    for side in sides:
        assert side.model.get_base_model().model.gradient_checkpointing is checkpointing


def test_mixed_precision_takes_the_same_path(tmp_path):
    """The setup of a GPU: bf16 weights under autocast, TRL's DPOTrainer as the third side."""
    half = build(replace(preset("tiny"), dtype="bfloat16"), RAGGED.vocabulary, "cpu")
    sides = sides_of(half, RAGGED, tmp_path, with_dpo=True)
    kinds = {value.dtype for value in half.parameters() if not value.requires_grad}
    assert kinds == {torch.bfloat16} and [side.name for side in sides] == [OURS, CPO, DPO]
    seen = set()
    for side in sides:
        mlp = side.model.get_base_model().model.layers[1].mlp
        mlp.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    memory, apart = preference.compare(sides)
    assert seen == {torch.bfloat16} and list(memory) == [OURS, CPO, DPO]
    assert apart["loss"] < 0.05 < 1 < apart["losses"][OURS]
    assert apart["gradients"] < 0.1 * apart["largest_gradient"]


ANCHORS = [name for name in (UNSHARED, FUSED, LIGER, FUSED_REPLIES) if name not in unavailable()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_anchors_have_the_same_loss_and_gradients(model, tmp_path, checkpointing):
    case = replace(RAGGED, checkpointing=checkpointing)
    sides = sides_of(model, case, tmp_path, with_anchors=True)
    assert {side.name for side in sides} == {OURS, CPO, *ANCHORS}
    memory, differences = preference.compare(sides)
    assert set(differences["losses"]) == set(memory) == {OURS, CPO, *ANCHORS}
    assert set(differences["apart"]) == {OURS, *ANCHORS}
    for apart in differences["apart"].values():
        assert apart["loss"] < 1e-5 and apart["gradients"] < 1e-4
    assert differences["apart"][OURS] == {name: differences[name] for name in ("loss", "gradients")}
    with norms_in_full():
        double = preference.compare(sides_of(copy.deepcopy(model).double(), case, tmp_path, with_anchors=True))[1]
    assert double["apart"][UNSHARED]["gradients"] < 1e-11
    for name in set(ANCHORS) - {UNSHARED}:  # they compute log-probabilities in fp32
        assert 1e-11 < double["apart"][name]["gradients"] < 1e-4
    # A wrong weight of the autoregressive term is seen.
    trainers = {side.name: side for side in sides_of(model, case, tmp_path, with_anchors=True)}
    trainers[CPO].compute_loss.__self__.cpo_alpha = 0.9
    changed = preference.compare(list(trainers.values()))[1]["apart"]
    assert all(apart["loss"] > 0.01 for apart in changed.values())


def test_operations_of_the_anchors_are_those_of_their_heads(model, tmp_path):
    if {FUSED, FUSED_REPLIES} & set(unavailable()):
        pytest.skip("this TRL has no fused head")
    counted = {side.name: operations(side) for side in sides_of(model, RAGGED, tmp_path, with_anchors=True)}
    head = 2 * 32 * 50  # a position's product with the head, width 32, 50 entries
    layers = counted[CPO] - 2 * head * 6 * 14  # six rows of length 14; forward, and the gradient of the input
    targets = sum(chosen + rejected for _, chosen, rejected in RAGGED.lengths)
    # TRL's head computes the logits again in the backward pass. No head predicts from a row's last position.
    assert counted[FUSED] - layers == 3 * head * 6 * 13
    assert counted[FUSED_REPLIES] - layers == 3 * head * targets
    if LIGER in counted:
        assert counted[LIGER] - layers == 2 * head * 6 * 13
    prompts = sum(prompt for prompt, _, _ in RAGGED.lengths)
    assert counted[OURS] < counted[UNSHARED] < counted[FUSED_REPLIES]  # each prompt once; no padding
    assert counted[UNSHARED] - counted[OURS] > prompts * 2 * 2 * sum(wide * high for wide, high in [(32, 32)] * 2)


def test_missing_packages_are_named(monkeypatch, model, tmp_path):
    monkeypatch.setattr(preference_anchors, "find_spec", lambda name: None)
    monkeypatch.delattr(preference_anchors.trl_utils, "add_fused_lm_head", raising=False)
    reasons = unavailable()
    assert "pip install --no-deps liger-kernel" in reasons[LIGER] and "trl>=" in reasons[FUSED]
    names = [side.name for side in sides_of(model, RAGGED, tmp_path, with_anchors=True)]
    assert names == [OURS, CPO, UNSHARED]


def test_different_parameters_are_refused():
    first, second = (Side(name, nn.Linear(2, 1, bias=bias), {}, None) for name, bias in (("a", True), ("b", False)))
    for side in (first, second):
        side.model(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match=r"a and b train different parameters: \['bias'\]"):
        largest_difference(first, second)


def test_norms_are_in_full_precision():
    norm, values = Qwen2RMSNorm(8).double(), torch.randn(3, 8, dtype=torch.float64)
    exact = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    with norms_in_full():
        torch.testing.assert_close(norm(values), exact, rtol=0, atol=1e-15)
    assert 1e-10 < (norm(values) - exact).abs().max() < 1e-5  # transformers' own


# ---------------------------------------------------------------------------------------------------- counters


def test_operations_of_a_product_and_of_attention_are_counted():
    linear = nn.Linear(5, 7)
    side = Side("linear", linear, {"x": torch.randn(3, 5)}, lambda model, batch: model(batch["x"]).sum())
    assert operations(side) == 2 * (2 * 3 * 5 * 7)  # no gradient of the input

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = nn.Parameter(torch.randn(2, 4, 6, 8))  # batch, heads, length, width

        def forward(self, queries):
            return nn.functional.scaled_dot_product_attention(queries, self.values, self.values)

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.sum()

        @staticmethod
        def backward(context, gradient):
            return torch.zeros(3, 7).addmm_(torch.ones(3, 5), torch.ones(5, 7)) * gradient

    class Added(nn.Linear):
        def forward(self, x):
            return InPlace.apply(self.weight)

    assert operations(Side("in place", Added(7, 3), {"x": None}, lambda model, batch: model(None))) == 2 * 3 * 5 * 7

    side = Side("attention", Attention(), {"x": torch.randn(2, 4, 3, 8)}, lambda model, batch: model(batch["x"]).sum())
    product = 2 * 2 * 4 * 3 * 6 * 8
    assert operations(side) == (2 + 5) * product


def test_the_small_vocabulary_has_the_heads_share_at_7b():
    shares = []
    for name, vocabulary in (("small", 5_000), ("qwen2.5-7b", 151_936)):
        model = build(preset(name), vocabulary, "meta")
        head = 2 * 2 * model.get_output_embeddings().weight.numel() * 2 * 210
        shares.append(head / operations_of(model, Case("one", ((180, 30, 30),), vocabulary), shared=False))
    assert shares == pytest.approx([0.072, 0.072], abs=0.001)


def test_trls_operations_are_those_of_its_layout(model, tmp_path):
    theirs = sides_of(model, RAGGED, tmp_path)[1]
    config, rank, kv = model.config, preset("tiny").rank, 8  # one key and value head of four
    # By hand: q and o, k and v, three of the gated unit; forward, gradient of the input, of the adapter's weights.
    shapes = [(32, 32), (32, 32), (32, kv), (32, kv), (32, 64), (32, 64), (64, 32)]
    block = sum(2 * wide * high + 3 * rank * (wide + high) for wide, high in shapes)
    unneeded = 32 * (32 + 2 * kv) + 3 * 32 * rank  # the first block's input: frozen embeddings
    positions, scores = 6 * 14, 6 * 14**2  # rows and padded length; seven products, one of them done twice
    expected = 2 * positions * (2 * block - unneeded + 2 * 32 * 50) + 7 * 2 * scores * 32 * 2
    assert operations_of(model, RAGGED, shared=False) == expected - 2 * scores * 32 * 2
    assert config.hidden_size == 32 and config.num_hidden_layers == 2
    assert operations(theirs) == expected


def test_checkpoints_are_counted_and_save_memory(model, tmp_path):
    case = Case("long", ((60, 4, 4),), vocabulary=50)
    plain = sides_of(model, case, tmp_path)[1]
    again = sides_of(model, replace(case, checkpointing=True), tmp_path)[1]
    assert operations(again) > 1.3 * operations(plain)
    (loss, memory), (other_loss, other_memory) = watched_step(again), watched_step(plain)
    assert memory < 0.7 * other_memory
    assert loss == pytest.approx(other_loss, abs=1e-6)


class Wasteful(torch.autograd.Function):
    """Allocates 4 MB temporarily in its forward pass and 8 MB in its backward pass."""

    @staticmethod
    def forward(context, value):
        torch.empty(1_000_000)
        return value * 2

    @staticmethod
    def backward(context, gradient):
        torch.empty(2_000_000)
        return gradient * 2


@pytest.mark.parametrize(("wasteful", "least", "most"), [(True, 8_000_000, 8_010_000), (False, 0, 10_000)])
def test_memory_is_seen_inside_of_autograd_functions_but_weights_are_not(wasteful, least, most):
    def loss(model, batch):
        output = model(batch["x"])
        return (Wasteful.apply(output) if wasteful else output).sum()

    heavy = nn.Linear(1, 10, bias=False)
    heavy.register_buffer("weights", torch.zeros(5_000_000))
    assert least <= watched_step(Side("one", heavy, {"x": torch.ones(1)}, loss))[1] <= most


def test_steps_take_turns_and_leave_no_gradients():
    turns = []

    def loss(model, batch):
        turns.append(batch["name"])
        return model(torch.ones(2)).sum()

    sides = [Side(name, nn.Linear(2, 1), {"name": name}, loss) for name in "ab"]
    seconds = median_seconds(sides, 3)
    assert "".join(turns) == "ababab" and list(seconds) == ["a", "b"] and min(seconds.values()) > 0
    assert all(side.gradients() == {} for side in sides)


# ---------------------------------------------------------------------------------------------------- the command


def test_a_small_run_writes_what_it_prints(tmp_path, capsys):
    path = tmp_path / "runs" / "preference.json"
    options = ["--preset", "tiny", "--cases", "1", "3", "--steps", "1", "--dpo", "--peak_tflops", "1"]
    result = preference.main([*options, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    out = capsys.readouterr().out
    assert preference.markdown(result["table"]) in out and preference.anchor_markdown(result["cases"]) in out
    assert result["skipped"] == unavailable() and all(reason in out for reason in result["skipped"].values())
    rows = [line.split(" | ")[1] for line in out.splitlines() if line.startswith("| 4 ragged pairs | ")]
    assert rows[-len(LADDER) + len(result["skipped"]) :] == [side for side in LADDER if side not in unavailable()]
    assert path.with_suffix(".svg").read_text().count("CPOTrainer") > 1
    assert result["machine"]["threads"] == 1 and result["model"]["tied_head"] is False
    assert [case["name"] for case in result["cases"]] == ["P 256, C 32", "4 ragged pairs"]
    assert result["cases"][0]["lengths"] == ((16, 2, 2),) and result["cases"][0]["vocabulary"] == 1000
    for case in result["cases"]:
        assert list(case["costs"])[:3] == [OURS, CPO, DPO] and set(case["costs"]) == {OURS, CPO, DPO, *ANCHORS}
        for name, ratio in case["anchors"][OURS].items():
            assert ratio == case["ratios"][name] and case["anchors"][CPO][name] == 1
        for name in preference.QUANTITIES:
            assert case["ratios"][name] == case["costs"][OURS][name] / case["costs"][CPO][name]
        cost = case["costs"][OURS]
        assert cost["counted"] == pytest.approx(cost["operations"] / cost["seconds"] / 1e12)
        needs = [cost["needed"] * cost["seconds"] for cost in case["costs"].values()]
        assert needs == pytest.approx([needs[0]] * len(needs)) and 0 < cost["needed"] <= cost["counted"]
    assert set(result["cases"][0]["differences"]) == {"float64", "float32"}
    assert set(result["cases"][1]["differences"]) == {"float32"}
    assert result["cases"][0]["ratios"]["memory"] < 0.7 and result["cases"][0]["ratios"]["operations"] < 0.7
    kinds = [line["quantity"].split(",")[0] for line in result["table"]]
    assert kinds.count("loss") == kinds.count("gradients (the largest)") == 3
    assert all(line["holds"] for line in result["table"] if "float64" in line["quantity"])


def test_the_table_tells_what_does_not_hold():
    costs = {
        FUSED: {},
        OURS: {"operations": 2e9, "seconds": 1.0, "memory": 2**20},
        CPO: dict.fromkeys(preference.QUANTITIES, 4e9),
    }
    found = {"name": "one", "costs": costs, "ratios": {"operations": 0.5, "seconds": 0.25, "memory": 0.1}}
    found["differences"] = {"float64": {"losses": {OURS: 1.0, CPO: 1.5}, "loss": 0.5, "gradients": 0.0}}
    found["differences"]["float64"]["largest_gradient"] = 3.0
    lines = preference.table_rows(found, {"operations": 0.5, "seconds": 0.2})
    assert [line["holds"] for line in lines] == [True, False, None, False, True]
    rows = preference.markdown(lines).splitlines()
    assert rows[2] == "| one | operations, GFLOP | 2 | 4 | 0.5 | <= 0.5 | yes |"
    assert rows[3].endswith("| 0.25 | <= 0.2 | no |") and rows[4].endswith("| 0.1 |  |  |")
    assert rows[5] == "| one | loss, float64 | 1 | 1.5 | 0.5 | <= 1e-08 | no |"


def test_a_sweep_is_tabled_and_drawn(tmp_path, capsys, monkeypatch):
    sweep = {"prompt": ("prompt (tokens)", (64, 512)), "raggedness": ("spread", (0.0, 0.75))}
    monkeypatch.setattr(preference, "SWEEP", sweep)
    path = tmp_path / "sweep.json"
    result = preference.main(["--preset", "tiny", "--sweep", "--steps", "1", "--output", str(path)])
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [point["value"] for point in result["sweep"]["prompt"]] == [64, 512]
    assert json.loads(path.read_text())["sweep"]["raggedness"][1]["value"] == 0.75
    out = capsys.readouterr().out
    ratio = result["sweep"]["prompt"][1]["ratios"]["operations"]
    assert f"| prompt | 512 | {ratio:.3f} |" in out and "| raggedness | 0 |" in out


def test_a_swept_spread_keeps_the_means():
    for value in (0.0, 0.5, 0.75):
        lengths = torch.tensor(preference.swept_case("raggedness", value).lengths).double()
        torch.testing.assert_close(lengths.mean(0), torch.tensor([180.0, 30.0, 30.0]).double(), atol=0.5, rtol=0)
        assert lengths[:, 0].max() == 180 * (1 + value)


def test_without_a_gpu_the_plan_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = preference.main(["--preset", "qwen2.5-7b"])
    assert "there is no GPU here" in capsys.readouterr().out and "cases" not in result
    assert [planned["vocabulary"] for planned in result["plan"]] == [151_936] * 3
    one = result["plan"][0]
    assert 14.5 < one["weights_gib"] < 16  # 7.6 billion in bf16, and the adapter
    assert one["needed_tflops"] / one["rows_tflops"] == pytest.approx(320 / 576, abs=0.06)  # the head is a small part


def test_too_little_memory_is_a_result(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(preference, "measure", fail)
    result = preference.main(["--preset", "tiny", "--cases", "1"])
    assert result["cases"] == [{"name": "P 256, C 32", "out_of_memory": "CUDA out of memory. Tried to allocate 2 GiB."}]
    assert result["table"] == []


@pytest.mark.parametrize(("options", "message"), [(["--steps", "0"], "--steps"), (["--cases", "9"], "from 1 to 5")])
def test_bad_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        preference.main(options)
    assert message in capsys.readouterr().err

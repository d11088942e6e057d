"""The loss on packed rows equals the loss on padded rows, for every batch; only a common prefix is shared."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.qwen2 import modeling_qwen2

from empathic.trainers import stage_trainer
from empathic.trainers.compat import enable_activation_checkpointing
from empathic.trainers.packing.rows import RowLayout, pack_rows
from empathic.trainers.samples import StageCollator
from empathic.trainers.stage_trainer import StageTrainer
from empathic.trainers.stages import StageConfig


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """transformers' norm rounds to float32."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", forward)


def sample(number, task, content, target, **more):
    earlier = [{"role": "user", "content": text} for text in more.pop("earlier", ())]
    messages = [*earlier, {"role": "user", "content": content}]
    return {"messages": messages, "task": task, "history": "memory", "target": target, "seed": None, "id": str(number)}


@pytest.fixture(scope="module")
def batches(processor, clip):
    audio, video = {"type": "audio", "path": clip}, {"type": "video", "path": clip}
    text = {"type": "text", "text": "how are you"}
    samples = {
        "emotion": [
            sample(0, "emotion", [audio], "happy"),
            sample(1, "emotion", [video], "sad"),
            sample(2, "emotion", [audio, video], "happy"),
        ],
        "memory": [
            sample(0, "memory", "hello there", "user: hello there"),
            sample(1, "memory", "how are you", "user: hello\nuser: how are you", earlier=["hello"]),
        ],
        "dialogue": [
            sample(0, "dialogue", [audio, text], "i am fine", earlier=["hello there", "what did he say"]),
            sample(1, "dialogue", "hello", "hello there , how are you"),
            sample(2, "memory", "hello there", "user: hello there"),
            sample(3, "dialogue", [video, text], "thanks"),
        ],
        "alone": [sample(0, "dialogue", [text], "i am fine")],
    }
    return {name: StageCollator(processor)(rows) for name, rows in samples.items()}


@pytest.fixture
def trainer(model, processor, tmp_path):
    def build(model=model, **settings):
        args = StageConfig(str(tmp_path), use_cpu=True, report_to="none", **settings)
        return StageTrainer(model=model.double(), args=args, processing_class=processor, data_collator=None)

    return build


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss().item(), found


def of_the_model(model, batch):
    """The reference: padded rows, all logits (not the model's own loss, which rounds them to float32)."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "sample_ids", "sample_places", "left_out")}
    return nn.functional.cross_entropy(model(**inputs).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])


def largest_difference(model, trainer, batch):
    loss, gradients = loss_and_gradients(model, lambda: of_the_model(model, batch))
    ours, found = loss_and_gradients(model, lambda: trainer.compute_loss(model, batch))
    assert found.keys() == gradients.keys() and len(found) > 50
    return max(abs(loss - ours), *((found[name] - gradient).abs().max().item() for name, gradient in gradients.items()))


@pytest.mark.parametrize("name", ["emotion", "memory", "dialogue", "alone"])
@pytest.mark.parametrize("shares", [True, False])
def test_loss_and_gradients_are_those_of_padded_rows(model, trainer, batches, name, shares):
    runner = trainer()
    assert runner._packs and runner._shares
    runner._shares = shares
    assert largest_difference(model, runner, batches[name]) < 1e-10


def test_activation_checkpointing_changes_nothing(model, trainer, batches):
    runner = trainer()
    enable_activation_checkpointing(model, {"use_reentrant": False})
    model.get_decoder().train()  # the Q-formers have dropout
    assert largest_difference(model, runner, batches["dialogue"]) < 1e-10


@pytest.mark.parametrize("wrong", ["mask", "positions"])
def test_a_wrong_mask_or_position_would_be_seen(model, trainer, batches, wrong, monkeypatch):
    pack = pack_rows

    def packed(*args):
        found = pack(*args)
        if wrong == "positions":
            count = found.inputs["input_ids"].shape[1]
            found.inputs["position_ids"] = torch.arange(count)[None]
        else:
            found.inputs["pair_layout"].ranges = lambda: [(0, found.inputs["input_ids"].shape[1], 0, 0)]
        return found

    monkeypatch.setattr(stage_trainer, "pack_rows", packed)
    assert largest_difference(model, trainer(), batches["emotion"]) > 1e-3


def test_the_common_beginning_is_there_once_and_no_placeholder_is_in_it(processor, batches):
    batch = batches["emotion"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    placeholders = {
        processor.tokenizer.convert_tokens_to_ids(t) for t in (processor.audio_token, processor.video_token)
    }
    shared = pack_rows(ids, mask, batch["labels"], placeholders)
    whole = pack_rows(ids, mask, batch["labels"], None)
    assert whole.inputs["input_ids"].shape[1] == mask.sum()
    prefix = shared.inputs["pair_layout"].prefix
    first = min(ids[0].tolist().index(token) for token in placeholders if token in ids[0])
    assert 5 < prefix <= first
    assert shared.inputs["input_ids"].shape[1] == mask.sum() - (len(ids) - 1) * prefix
    assert shared.targets.equal(whole.targets) and len(shared.targets) == (batch["labels"] != -100).sum()
    assert shared.inputs["position_ids"].max() == mask.sum(1).max() - 1


def test_rows_that_are_the_same_up_to_their_targets():
    """Every row keeps a token of its own, and the last shared one predicts the first target of each."""
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0]])
    labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]])
    packed = pack_rows(ids, (ids > 0).long(), labels, set())
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert packed.columns.tolist() == [1, 2, 1] and packed.targets.tolist() == [7, 8, 9]
    same = pack_rows(ids[:1].repeat(2, 1), torch.ones(2, 4).long(), torch.full((2, 4), -100), set())
    assert same.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 8]] and len(same.columns) == 0


@pytest.mark.parametrize("way", ["attend", "batched"])
def test_layout_is_attention_row_by_row(way):
    torch.manual_seed(0)
    prefix, rests, heads, width = 3, [4, 1, 2], 2, 8
    query, key, value = (torch.randn(1, heads, prefix + sum(rests), width, dtype=torch.float64) for _ in range(3))
    ours = getattr(RowLayout(prefix, rests, query.device), way)(query, key, value, 0.0, None)
    starts = [prefix, prefix + 4, prefix + 5]
    for start, rest in zip(starts, rests, strict=True):
        row = [*range(prefix), *range(start, start + rest)]
        alone = nn.functional.scaled_dot_product_attention(*(t[:, :, row] for t in (query, key, value)), is_causal=True)
        assert torch.allclose(ours[:, row], alone.transpose(1, 2), atol=1e-12)


def test_with_dropout_nothing_is_shared(model, trainer):
    layer = model.get_decoder().layers[0]
    layer.self_attn.attention_dropout = 0.1
    runner = trainer()
    assert runner._packs and not runner._shares
    layer.self_attn.attention_dropout = 0.0
    assert trainer()._shares
    layer.mlp.up_proj = nn.Sequential(nn.Dropout(0.1), layer.mlp.up_proj)  # as in LoRA
    assert not trainer()._shares


def test_what_cannot_be_packed_is_padded_and_said(model, trainer, batches, caplog):
    model.set_attn_implementation({"text_config": "eager"})
    runner = trainer()
    assert not runner._packs and "Rows are padded, not packed: its attention is 'eager'" in caplog.text
    assert largest_difference(model, runner, batches["dialogue"]) < 1e-10


def test_a_language_model_that_does_not_follow_the_layout_is_found_out(model, trainer, batches, caplog):
    """GPT-2's attention follows the layout; this test simulates that it does not."""
    runner = trainer()
    runner._decoder = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=9)).transformer
    loss = runner.compute_loss(model, batches["emotion"])
    assert not runner._packs and "2 of 3 layers of GPT2Model attend row by row" in caplog.text
    assert loss.item() == pytest.approx(of_the_model(model, batches["emotion"]).item(), abs=1e-10)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("left_out", [False, True])
def test_the_loss_of_an_evaluation_is_the_mean_over_all_targets(model, processor, tmp_path, packs, left_out):
    """For any division into batches, with and without samples that are left out."""
    targets = ("i am fine", "thanks", "hello there , how are you", "no", "what did he say about the old dog")
    rows = [sample(number, "dialogue", "how are you", target) for number, target in enumerate(targets)]
    nothing = [sample(number, "dialogue", "", "old dog") for number in (7, 8, 9)] if left_out else []
    collator, found = StageCollator(processor), []
    for size in (1, 2, 8):
        args = StageConfig(
            str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=size, disable_tqdm=True
        )
        runner = StageTrainer(
            model=model.double(),
            args=args,
            processing_class=processor,
            data_collator=collator,
            eval_dataset=[*nothing, *rows],
        )
        runner._packs = packs
        found.append(runner.evaluate()["eval_loss"])
    with torch.no_grad():
        assert found == pytest.approx([of_the_model(model.eval(), collator(rows)).item()] * 3, abs=1e-10)


def test_samples_that_fill_up_the_last_batch_count_once(trainer, processor, monkeypatch):
    """The second of two processes has samples 2 and 3 of the last four, of which three are real and one is left out."""
    runner = trainer()
    rows = [sample(number, "dialogue", text, "fine") for number, text in ((0, ""), (1, "hello"), (2, "thanks"))]
    batch = StageCollator(processor)(rows)
    monkeypatch.setattr(type(runner.accelerator), "num_processes", 2)
    monkeypatch.setattr(type(runner.accelerator), "process_index", 1)
    state = runner.accelerator.gradient_state
    monkeypatch.setattr(type(state), "end_of_dataloader", True)
    for remainder, real in ((6, [True, True]), (5, [True, False]), (4, [False, False]), (0, [True, True])):
        monkeypatch.setattr(type(state), "remainder", remainder)
        labels = runner._without_repeated_samples(batch)["labels"]
        assert (labels != -100).any(1).tolist() == real
    monkeypatch.setattr(type(state), "end_of_dataloader", False)
    assert runner._without_repeated_samples(batch) is batch


def test_an_optimizer_step_is_averaged_over_all_its_targets(model, trainer, batches):
    runner = trainer()
    total = sum((batch["labels"] != -100).sum() for batch in batches.values())
    losses = sum(runner.compute_loss(model, batch, num_items_in_batch=total) for batch in batches.values())
    sums = sum(of_the_model(model, batch) * (batch["labels"] != -100).sum() for batch in batches.values())
    assert losses.item() == pytest.approx((sums / total).item(), abs=1e-10)

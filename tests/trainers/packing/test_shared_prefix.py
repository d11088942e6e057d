"""Packed pairs that share their prompt: the same loss and gradients as separate sequences, and as TRL."""

import logging
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from empathic.trainers import EPOConfig, EPOTrainer
from empathic.trainers.compat import enable_activation_checkpointing
from empathic.trainers.packing import log_probabilities, shared_prefix
from empathic.trainers.packing.shared_prefix import PairLayout, pack_pairs
from empathic.trainers.preference_collator import PreferenceCollator

WORDS = "i am so sad today that is great news bad tell me more oh no yes well done".split()
# Ragged on purpose; the replies of the second row start alike.
ROWS = [
    {"prompt": "i am so sad today", "chosen": " oh no tell me more", "rejected": " great"},
    {"prompt": "great news", "chosen": " oh yes", "rejected": " oh no that is so bad"},
    {"prompt": "i am bad", "chosen": " no", "rejected": " yes"},
    {"prompt": "me", "chosen": " that is so great well done", "rejected": " no no"},
]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,  # so that log-probabilities differ
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: <pad>, </s>, then WORDS."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", *WORDS])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def tiny_model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen2Config(**SIZES))


def config(tmp_path, **changes) -> EPOConfig:
    return EPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **changes)


def trl_trainer(tmp_path, model, rows):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5}
    settings |= {"gradient_checkpointing": False, "bf16": False, "use_cpu": True, "report_to": "none"}
    args = CPOConfig(output_dir=str(tmp_path), **settings)
    return CPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer())


@pytest.fixture
def exact(monkeypatch):
    """transformers' norm computes in fp32 for any input dtype."""

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def trainer_of(model, tmp_path, **changes):
    return EPOTrainer(model, config(tmp_path, **changes), train_dataset=ROWS, processing_class=word_tokenizer())


def loss_and_gradients(trainer, model, batch):
    model.zero_grad()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_by_one(model, rows, beta=2.0, gamma=0.5):
    """Compute the loss from the full logits of each sequence by itself."""
    means, nll, count = [], 0, 0
    batch = PreferenceCollator(word_tokenizer())(rows)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logps = model(ids[None, :length]).logits[0, :-1].log_softmax(-1)
        logps = logps.gather(1, ids[1:length, None])[:, 0][labels[1:length] != -100]
        means.append(logps.mean())
        if len(means) <= len(rows):
            nll, count = nll - logps.sum(), count + len(logps)
    chosen, rejected = torch.stack(means).chunk(2)
    return torch.nn.functional.softplus(gamma - beta * (chosen - rejected)).mean() + nll / count


def test_a_packed_row():
    """Two pairs: `5 6 | 7 1 | 8 9 1`, and `5 | 6 1 | 1`, whose replies are 6 and nothing."""
    chosen, rejected = [[5, 6, 7, 1, 0], [5, 6, 1, 0, 0]], [[5, 6, 8, 9, 1], [5, 1, 0, 0, 0]]
    input_ids = torch.tensor(chosen + rejected)
    labels = input_ids.clone()
    labels[[0, 2], :2] = labels[[1, 3], :1] = -100
    labels[input_ids == 0] = -100
    packed = pack_pairs(input_ids, (input_ids != 0).long(), labels)
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 8, 9, 1, 5, 6, 1, 1]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4, 0, 1, 2, 1]]
    layout = packed.inputs["pair_layout"]
    assert layout.spans == [(0, 2, 4, 7), (7, 1, 10, 11)]
    assert layout.ranges() == [(0, 4, 0, 0), (4, 7, 0, 2), (7, 10, 7, 7), (10, 11, 7, 8)]
    assert packed.lengths == [2, 2, 3, 1] and not packed.repeats_prompts
    assert packed.targets.tolist() == [7, 1, 6, 1, 8, 9, 1, 1]
    assert packed.columns.tolist() == [1, 2, 7, 8, 1, 4, 5, 7]
    apart = pack_pairs(input_ids, (input_ids != 0).long(), labels, share=False)
    assert apart.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 5, 6, 8, 9, 1, 5, 6, 1, 5, 1]]
    assert apart.inputs["pair_layout"].spans == [(0, 0, 4, 9), (9, 0, 12, 14)]
    labels[2, 2] = -100  # as if the second prompt were longer
    assert apart.repeats_prompts and pack_pairs(input_ids, (input_ids != 0).long(), labels).repeats_prompts


def test_replies_that_begin_alike_share_that_too():
    """If a tokenizer joins prompt and reply, the shared prefix is shorter than the prompt."""
    input_ids = torch.tensor([[5, 6, 7, 1], [5, 6, 8, 1]])
    labels = torch.tensor([[-100, 6, 7, 1], [-100, 6, 8, 1]])
    packed = pack_pairs(input_ids, torch.ones_like(input_ids), labels)
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 8, 1]]
    assert packed.columns.tolist() == [0, 1, 2, 0, 1, 4] and packed.targets.tolist() == [6, 7, 1, 6, 8, 1]
    same = pack_pairs(input_ids[:1].repeat(2, 1), torch.ones_like(input_ids), labels[:1].repeat(2, 1))
    assert same.inputs["input_ids"].tolist() == [[5, 6, 7, 1]] and same.lengths == [3, 3]


def qwen(tied=False, **changes):
    model = tiny_model().double()
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def with_lora(head=False):
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"] + ["lm_head"] * head
    return get_peft_model(qwen(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).double()


CASES = {
    "one pair": (ROWS[:1], qwen, {}),
    "ragged": (ROWS, qwen, {}),
    "not shared": (ROWS, qwen, {"share_prompt": False}),
    "checkpointing": (ROWS, qwen, {"activation_checkpointing": True}),
    "tied head": (ROWS, lambda: qwen(tied=True), {}),
    "frozen head": (ROWS, lambda: frozen_head(qwen()), {}),
    "lora": (ROWS, with_lora, {}),
    "lora, checkpointing": (ROWS, with_lora, {"activation_checkpointing": True}),
    "lora on the head": (ROWS, lambda: with_lora(head=True), {}),
}


def frozen_head(model):
    model.lm_head.requires_grad_(False)
    return model


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_trls_in_fp64(tmp_path, exact, case):
    rows, build, settings = CASES[case]
    theirs, ours = build(), build()
    reference = trl_trainer(tmp_path, theirs, rows)
    batch = reference.data_collator([reference.train_dataset[i] for i in range(len(rows))])
    theirs.train()
    expected, gradients = loss_and_gradients(reference, theirs, batch)

    trainer = trainer_of(ours, tmp_path, **settings)
    if settings.get("activation_checkpointing"):
        enable_activation_checkpointing(ours)
    ours.train()
    loss, found = loss_and_gradients(trainer, ours, trainer.data_collator(rows))
    assert trainer._packs and loss.dtype == torch.float64
    assert abs(loss - expected) < 1e-10
    assert found.keys() == gradients.keys() and any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def sees_the_chosen(self):
    return [
        each
        for start, _, rejected, end in self.spans
        for each in ((start, rejected, 0, 0), (rejected, end, start, rejected))
    ]


def positions_go_on(*args, **kwargs):
    packed = pack_pairs(*args, **kwargs)
    packed.inputs["position_ids"] = torch.arange(packed.inputs["input_ids"].shape[1])[None]
    return packed


def pairs_are_not_told_apart(*args, **kwargs):
    """Let the second of two pairs attend to the first."""
    packed = pack_pairs(*args, **kwargs)
    (first, *_), (*_, rejected, end) = packed.inputs["pair_layout"].spans
    packed.inputs["pair_layout"].spans = [(first, rejected, rejected, end)]
    return packed


@pytest.mark.parametrize("wrong", ["", "mask", "positions", "pairs"])
def test_a_wrong_mask_or_wrong_positions_are_seen(tmp_path, exact, monkeypatch, wrong):
    """The control of the test above: each mistake changes the loss by more than a thousandth."""
    model = qwen()
    with torch.no_grad():
        expected = one_by_one(model, ROWS[:2])
    if wrong == "mask":
        monkeypatch.setattr(PairLayout, "ranges", sees_the_chosen)
    elif wrong:
        change = positions_go_on if wrong == "positions" else pairs_are_not_told_apart
        monkeypatch.setattr("empathic.trainers.epo_trainer.pack_pairs", change)
    trainer = trainer_of(model, tmp_path)
    loss = trainer.compute_loss(model, trainer.data_collator(ROWS[:2])).detach()
    assert trainer._packs
    assert (abs(loss - expected) > 1e-3) if wrong else (abs(loss - expected) < 1e-10)


WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3, "use_sliding_window": True}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 1}
MODELS = {
    "llama": (LlamaConfig(**SIZES), None),
    "qwen3": (Qwen3Config(**SIZES), None),
    "gpt2": (GPT2Config(**GPT2, bos_token_id=1, pad_token_id=0, initializer_range=0.3), None),
    "eager": (Qwen2Config(**SIZES, attn_implementation="eager"), "its attention is 'eager'"),
    "window": (Qwen2Config(**SIZES, **WINDOW), "use full attention: full_attention, sliding_attention"),
    "mistral's window": (MistralConfig(**SIZES, sliding_window=3), "uses sliding_window"),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=2.0), "changes the logits of its head"),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_share_or_say_why_not(tmp_path, caplog, name):
    settings, reason = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings).eval()
    with caplog.at_level(logging.WARNING, logger="empathic.trainers"):
        trainer = trainer_of(model, tmp_path)
        batch = trainer.data_collator(ROWS)
        for _ in range(2):
            loss = trainer.compute_loss(model, batch)
    lines = [record.getMessage() for record in caplog.records if record.name == "empathic.trainers.packed_trainer"]
    assert trainer._packs == (reason is None)
    assert not lines if reason is None else reason in "\n".join(lines)
    assert len(lines) == len(set(lines))  # once each
    torch.testing.assert_close(loss, one_by_one(model, ROWS), atol=1e-5, rtol=0)


def test_virtual_tokens_are_run_the_usual_way(tmp_path, caplog):
    """An adapter that adds tokens before the prompt shifts every position."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with caplog.at_level(logging.WARNING, logger="empathic.trainers"):
        trainer = trainer_of(model, tmp_path)
    assert "adds virtual tokens before the prompt" in caplog.text
    loss, metrics = trainer.compute_loss(model, trainer.data_collator(ROWS[:1]), return_outputs=True)
    ids = torch.tensor([word_tokenizer()(ROWS[0]["prompt"] + ROWS[0]["chosen"])["input_ids"] + [1]])
    logps = model(ids).logits[0, -7:-1].log_softmax(-1).gather(1, ids[0, -6:, None])  # five words and the end
    assert metrics["logps/chosen"] == pytest.approx(logps.mean().item(), abs=1e-5) and loss.requires_grad


def test_a_batch_without_targets_does_not_hide_that_logits_are_bent(tmp_path):
    """The first batch of a rank may consist of pairs that are left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["gemma2"][0]).eval()
    trainer = trainer_of(model, tmp_path)
    empty = trainer.data_collator(ROWS)
    empty["labels"] = torch.full_like(empty["labels"], -100)
    assert trainer.compute_loss(model, empty) == 0
    torch.testing.assert_close(
        trainer.compute_loss(model, trainer.data_collator(ROWS)), one_by_one(model, ROWS), atol=1e-5, rtol=0
    )

    model = tiny_model()
    trainer = trainer_of(model, tmp_path)
    for _ in range(2):  # also once the head is trusted
        model.zero_grad()
        loss = trainer.compute_loss(model, empty)
        loss.backward()
        assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_no_tensor_of_logits_is_ever_made(tmp_path, monkeypatch):
    """Forward and backward of a frozen head hold eight rows of logits, not one for each of 43 tokens or 22 targets."""
    monkeypatch.setitem(log_probabilities.CHUNK_BYTES, "cpu", 1)

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if torch.is_tensor(output) and output.dim() and output.shape[-1] == 997:
                self.rows = max(self.rows, output.numel() // 997)
            return output

    torch.manual_seed(0)
    model = frozen_head(AutoModelForCausalLM.from_config(Qwen2Config(**SIZES | {"vocab_size": 997, "hidden_size": 8})))
    trainer = trainer_of(model, tmp_path)
    with Largest() as largest:
        trainer.compute_loss(model, trainer.data_collator(ROWS)).backward()
    assert trainer._packs and largest.rows == 8


def test_with_dropout_no_prompt_is_shared_in_training(tmp_path, caplog):
    """The sequences are packed all the same, and in evaluation, where dropout is off, the prompts are shared."""
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(tiny_model(), adapter)
    trainer = trainer_of(model, tmp_path, disable_dropout=False)
    batch, tokens = trainer.data_collator(ROWS), []
    handle = (
        model.get_base_model()
        .model.layers[0]
        .register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[:2]))
    )
    with caplog.at_level(logging.WARNING, logger="empathic.trainers"):
        model.train()
        losses = {trainer.compute_loss(model, batch).item() for _ in range(3)}
        assert len(losses) == 3
        model.eval()
        torch.testing.assert_close(trainer.compute_loss(model, batch), one_by_one(model, ROWS), atol=1e-5, rtol=0)
    handle.remove()
    whole = int(batch["attention_mask"].sum())
    shared = sum(len(row["prompt"].split()) for row in ROWS) + 1  # "oh"
    assert tokens[0] == (1, whole) and tokens[3] == (1, whole - shared)
    lines = [record.getMessage() for record in caplog.records if "dropout" in record.getMessage()]
    assert len(lines) == 1


def test_the_work_grows_with_the_tokens_and_not_with_the_row(tmp_path):
    """Twice as many equal pairs need twice the operations, including attention."""
    model = frozen_head(tiny_model())
    trainer = trainer_of(model, tmp_path)
    counts = []
    for copies in (1, 2, 8):
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(model, trainer.data_collator([ROWS[0]] * copies)).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == 2 * counts[0] and counts[2] == 8 * counts[0]


def test_calls_without_pairs_are_as_before(tmp_path):
    """Generation and evaluation of a model that has trained."""
    model = tiny_model().eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    expected = model(**inputs).logits
    reply = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trainer = trainer_of(model, tmp_path)
    trainer.compute_loss(model, trainer.data_collator(ROWS))
    assert trainer._packs and isinstance(shared_prefix.ALL_ATTENTION_FUNCTIONS["sdpa"], shared_prefix._PairAttention)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=0, rtol=0)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), reply)

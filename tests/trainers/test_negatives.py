"""Several rejected replies of a row: batches, the loss against separate rows, costs, limits, and divisions."""

import json
import logging
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from empathic.processes import leave
from empathic.trainers import EPOConfig, EPOTrainer, train
from empathic.trainers.monitor import Monitor
from empathic.trainers.packing.shared_prefix import pack_pairs
from empathic.trainers.preference_collator import PreferenceCollator

WORDS = "i am so sad today that is great news bad tell me more oh no yes well done".split()
ROWS = [
    {
        "prompt": "i am so sad today",
        "chosen": " oh no tell me more",
        "rejected": " great",
        "negatives": [" well done", " great news that is great"],
    },
    {"prompt": "great news", "chosen": " oh yes", "rejected": " oh no that is so bad", "negatives": []},
    {"prompt": "i am bad", "chosen": " no", "rejected": " yes", "negatives": [" great", " no no", " well"]},
    {"prompt": "me", "chosen": " that is so great well done", "rejected": " no no", "negatives": None},
    {"prompt": "oh", "chosen": " tell me", "rejected": " well done well done more", "negatives": [" bad"]},
]
METRICS = (
    "nll_loss",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"logps/{name}" for name in ("chosen", "rejected")),
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: <pad>, </s>, then WORDS."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", *WORDS])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def tiny_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,  # so that log-probabilities differ
    }
    return Qwen2ForCausalLM(Qwen2Config(**sizes))


@pytest.fixture
def exact(monkeypatch):
    """transformers' norm computes in fp32 for any input dtype."""

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


def config(tmp_path, **changes) -> EPOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 5,
        "num_train_epochs": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return EPOConfig(**settings | changes)


def trainer_of(model, tmp_path, rows=ROWS, **changes) -> EPOTrainer:
    return EPOTrainer(
        model, config(tmp_path, **changes), train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer()
    )


def separate(row: dict, limit: int | None = None) -> list[dict]:
    """A row for each rejected reply."""
    replies = [row["rejected"], *(row["negatives"] or [])][:limit]
    return [{**row, "rejected": reply, "negatives": None} for reply in replies]


def loss_and_gradients(trainer, model, rows):
    model.zero_grad()
    loss, metrics = trainer.compute_loss(model, trainer.data_collator(rows), return_outputs=True)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, metrics


# ---------------------------------------------------------------------------------------------------- batches


def test_further_negatives_follow_the_pairs():
    batch = PreferenceCollator(word_tokenizer(), negatives=None)(ROWS)
    assert batch["negative_of"].tolist() == [0, 0, 2, 2, 2, 4] and batch["left_out_negatives"] == []
    replies = [row["chosen"] for row in ROWS] + [row["rejected"] for row in ROWS]
    replies += [reply for row in ROWS for reply in row["negatives"] or []]
    tokenizer = word_tokenizer()
    assert len(batch["labels"]) == len(replies) == 16
    for labels, reply in zip(batch["labels"], replies, strict=True):
        assert tokenizer.decode(labels[labels != -100]) == f"{reply.strip()} </s>"
    two = PreferenceCollator(tokenizer, negatives=2)(ROWS)
    assert two["negative_of"].tolist() == [0, 2, 4]
    lowest = PreferenceCollator(tokenizer)(ROWS)
    without = PreferenceCollator(tokenizer)([{k: v for k, v in row.items() if k != "negatives"} for row in ROWS])
    assert lowest.keys() == without.keys() and "negative_of" not in lowest
    assert all(torch.equal(value, without[key]) for key, value in lowest.items() if torch.is_tensor(value))


def test_conversational_negatives_also_if_they_repeat_the_rejected_one():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"

    def reply(text):
        return [{"role": "assistant", "content": text}]

    row = {"prompt": [{"role": "user", "content": "i am sad"}], "chosen": reply("oh no"), "rejected": reply("great")}
    for negatives in ([reply("yes"), reply("well")], [reply("great"), reply("yes"), reply("well")]):
        stored = Dataset.from_list([{**row, "negatives": negatives}])
        batch = PreferenceCollator(tokenizer, negatives=None)(list(stored))
        targets = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
        assert targets == ["oh no </s>", "great </s>", "yes </s>", "well </s>"]


@pytest.mark.parametrize(
    ("negatives", "message"),
    [
        ("great", "Row 1: negatives must be a list of rejected replies, got str"),
        ([[{"role": "assistant", "content": "a"}]], "Row 1: prompt, chosen and negatives must be three strings"),
        ([None], "Row 1: prompt, chosen and negatives must be three strings"),
    ],
)
def test_bad_negatives_are_named_and_ignored_where_they_are_not_used(negatives, message):
    rows = [ROWS[0], {**ROWS[1], "negatives": negatives}]
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(word_tokenizer(), negatives=None)(rows)
    PreferenceCollator(word_tokenizer())(rows)


def test_a_packed_row_with_three_rejected_replies():
    """`5 6 | 7 1 | 8 1 | 9 9 1 | 1`, and a group of one sequence, `5 4`."""
    rows = [[5, 6, 7, 1, 0], [5, 6, 8, 1, 0], [5, 6, 9, 9, 1], [5, 6, 1, 0, 0], [5, 4, 0, 0, 0]]
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:4, :2] = labels[4, 0] = -100
    labels[input_ids == 0] = -100
    packed = pack_pairs(input_ids, (input_ids != 0).long(), labels, groups=[[0, 1, 2, 3], [4]])
    assert packed.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 8, 1, 9, 9, 1, 1, 5, 4]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 2, 3, 4, 2, 0, 1]]
    layout = packed.inputs["pair_layout"]
    assert layout.spans == [(0, 2, 4, 6), (10, 0, 12, 12)] and layout.further == {0: [(2, 6, 9), (2, 9, 10)]}
    assert layout.ranges() == [(0, 4, 0, 0), (4, 6, 0, 2), (6, 9, 0, 2), (9, 10, 0, 2), (10, 12, 10, 10)]
    assert packed.targets.tolist() == [7, 1, 8, 1, 9, 9, 1, 1, 4] and packed.lengths == [2, 2, 3, 1, 1]
    assert packed.columns.tolist() == [1, 2, 1, 4, 1, 6, 7, 1, 10] and not packed.repeats_prompts
    apart = pack_pairs(input_ids, (input_ids != 0).long(), labels, False, [[0, 1, 2, 3], [4]])
    assert apart.inputs["input_ids"].tolist() == [[5, 6, 7, 1, 5, 6, 8, 1, 5, 6, 9, 9, 1, 5, 6, 1, 5, 4]]


# ---------------------------------------------------------------------------------------------------- the loss


def with_lora():
    torch.manual_seed(1)
    return get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def no_packing(trainer):
    trainer._packs = False


def all_logits(trainer):
    trainer._packs = trainer._skips_logits = False


CASES = {
    "packed": ({}, tiny_model, None),
    "lora": ({}, with_lora, None),
    "prompts not shared": ({"share_prompt": False}, tiny_model, None),
    "padded": ({}, tiny_model, no_packing),
    "all logits": ({}, tiny_model, all_logits),
}


@pytest.mark.parametrize("case", CASES)
def test_n_negatives_are_n_separate_rows_in_fp64(tmp_path, exact, case):
    """The mean over the rejected replies of a row, and the autoregressive term once."""
    settings, build, change = CASES[case]
    model = build().double()
    ours = trainer_of(model, tmp_path, negatives="all", **settings)
    theirs = trainer_of(model, tmp_path)
    if change is not None:
        change(ours)
    for row in (ROWS[0], ROWS[2]):
        loss, found, metrics = loss_and_gradients(ours, model, [row])
        expected, gradients, expected_metrics = loss_and_gradients(theirs, model, separate(row))
        assert loss.dtype == torch.float64 and abs(loss - expected) < 1e-12
        assert found.keys() == gradients.keys() and any(gradient.any() for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        for name in METRICS:
            assert metrics[name] == pytest.approx(expected_metrics[name], abs=1e-6), name
    # A batch of ragged rows: every row counts once, however many rejected replies it has.
    args = ours.args
    loss, found, _ = loss_and_gradients(ours, model, ROWS)
    alone = [loss_and_gradients(theirs, model, separate(row)) for row in ROWS]
    nll = [m["nll_loss"] for *_, m in alone]
    tokens = [len(row["chosen"].split()) + 1 for row in ROWS]
    expected = sum(one.item() - args.nll_weight * n for (one, *_), n in zip(alone, nll, strict=True)) / len(ROWS)
    expected += sum(n * count for n, count in zip(nll, tokens, strict=True)) / sum(tokens)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_listwise_loss_is_a_softmax_over_the_rewards_in_fp64(tmp_path, exact):
    """Against an independent computation from the logits of each sequence by itself."""
    model = tiny_model().double()
    trainer = trainer_of(model, tmp_path, negatives="all", negatives_loss="listwise", nll_weight=0.0)
    loss, found, _ = loss_and_gradients(trainer, model, ROWS)
    model.zero_grad()
    tokenizer, total = word_tokenizer(), 0
    for row in ROWS:
        rewards = []
        for reply in (row["chosen"], row["rejected"], *(row["negatives"] or [])):
            prompt = len(row["prompt"].split())
            ids = torch.tensor([[*tokenizer(row["prompt"] + reply)["input_ids"], 1]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[prompt - 1 :, 0]
            rewards.append(2.0 * logps.mean())
        rewards[0] = rewards[0] - 0.5
        total = total - torch.stack(rewards).log_softmax(0)[0]
    expected = total / len(ROWS)
    expected.backward()
    assert abs(loss - expected.detach()) < 1e-12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    pairs = trainer_of(model, tmp_path, negatives="all", nll_weight=0.0)
    assert abs(loss_and_gradients(pairs, model, ROWS)[0] - loss) > 1e-2


def test_old_rows_and_settings_give_the_old_losses_bit_by_bit(tmp_path):
    """Rows without further replies are the same under every setting; and by default the column is not used."""
    plain = [{key: value for key, value in row.items() if key != "negatives"} for row in ROWS]
    runs = []
    for rows, changes in ((plain, {}), (ROWS, {}), (ROWS, {"negatives": 1}), (plain, {"negatives": "all"})):
        trainer = trainer_of(tiny_model(), tmp_path, rows, **changes)
        trainer.train()
        logs = [
            {n: log[n] for n in ("loss", "grad_norm", *METRICS)} for log in trainer.state.log_history if "loss" in log
        ]
        runs.append((logs, [p.detach() for p in trainer.model.parameters()]))
    for logs, parameters in runs[1:]:
        assert logs == runs[0][0]
        assert all(map(torch.equal, parameters, runs[0][1]))


# ---------------------------------------------------------------------------------------------------- costs


def test_a_negative_costs_its_own_tokens(tmp_path):
    """Tokens and operations, also of attention, grow by the same with each equal reply, and by less than for a row."""
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, negatives="all")
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    reply = " great no no"
    counts = []
    for further in range(5):
        row = {**ROWS[0], "rejected": reply, "negatives": [" yes yes yes"] * further}
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(model, trainer.data_collator([row])).backward()
        counts.append(counter.get_total_flops())
    assert trainer._packs
    own = len(reply.split()) + 1
    assert seen == [5 + 6 + own * number for number in range(1, 6)]
    assert len({after - before for before, after in pairwise(counts)}) == 1
    with FlopCounterMode(display=False) as counter:
        rows = [{**ROWS[0], "rejected": reply, "negatives": None}] * 5
        trainer.compute_loss(model, trainer.data_collator(rows)).backward()
    assert counts[4] < 0.6 * counter.get_total_flops()


def test_the_monitor_counts_rows_and_the_tokens_of_all_replies(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, negatives="all")
    monitor = Monitor(trainer)
    batch = trainer.data_collator(ROWS)
    monitor.count(batch)
    assert int(monitor.meter._samples) == 5 and int(monitor.meter._tokens) == int(batch["attention_mask"].sum())


# ---------------------------------------------------------------------------------------------------- limits


def test_too_long_negatives_are_left_out_and_reported(tmp_path, caplog):
    """The row keeps those that fit; without any, the pair is left out."""
    rows = [
        ROWS[0],  # the last one has 11 tokens
        {**ROWS[1], "rejected": " oh no that is so bad so bad so", "negatives": [" bad", " bad " * 11]},
        {**ROWS[4], "rejected": " well " * 10, "negatives": [" well " * 12]},
    ]
    with caplog.at_level(logging.WARNING, logger="empathic.trainers"):
        trainer = trainer_of(tiny_model(), tmp_path, rows, negatives="all", max_length=11)
        trainer.train()
    messages = [record.getMessage() for record in caplog.records]
    for line in (
        "train row 1: rejected reply 1 is left out: prompt + rejected have 12 tokens, more than max_length=11. Raise "
        "max_length or shorten the row",
        "train row 1: rejected reply 3 is left out: prompt + negatives have 14 tokens, more than max_length=11. Raise "
        "max_length or shorten the row",
        "train row 2 is left out: prompt + rejected have 12 tokens, more than max_length=11. Raise max_length or "
        "shorten the row",
        "1 of 3 train pairs were left out.",
        "2 rejected replies of the train pairs were left out.",
    ):
        assert messages.count(line) == 1, (line, messages)
    assert trainer.state.log_history[-1]["left_out_pairs"] == 1
    assert trainer.state.log_history[-1]["left_out_negatives"] == 2
    kept = [rows[0], {**rows[1], "rejected": " bad", "negatives": None}]
    other = trainer_of(tiny_model(), tmp_path, kept, negatives="all", max_length=11)
    other.train()
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert trainer.evaluate()["eval_left_out_negatives"] == 2


def test_settings_are_checked(tmp_path, caplog):
    for settings, message in (
        ({"negatives": "most"}, "negatives must be lowest, all or a whole number from 1, got 'most'"),
        ({"negatives": 0}, "negatives must be .* got 0"),
        ({"negatives": None}, "negatives must be .* got None"),
        ({"negatives_loss": "best"}, "negatives_loss must be one of pairs, listwise, got 'best'"),
    ):
        with pytest.raises(ValueError, match=message):
            EPOConfig(**settings)
    args = config(tmp_path, negatives="all")
    collator = PreferenceCollator(word_tokenizer())
    with pytest.raises(ValueError, match=r"negatives is 'all', but the data_collator has negatives=1"):
        EPOTrainer(tiny_model(), args, ROWS, processing_class=word_tokenizer(), data_collator=collator)
    plain = [{key: value for key, value in row.items() if key != "negatives"} for row in ROWS]
    EPOTrainer(tiny_model(), args, plain, processing_class=word_tokenizer())
    assert "the train data set has no column negatives" in caplog.text


def test_the_option_is_read_from_the_command_line_and_from_yaml(tmp_path):
    file = tmp_path / "epo.yaml"
    for line, expected in (("", "lowest"), ("negatives: all", "all"), ("negatives: 3", 3)):
        file.write_text(f"stage: epo\ndataset_name: [a]\noutput_dir: {tmp_path}\nuse_cpu: true\n{line}\n")
        assert train.parse(["--config", str(file)])[1].negatives == expected
    found = train.parse(["--config", str(file), "--negatives", "2", "--negatives_loss", "listwise"])[1]
    assert (found.negatives, found.negatives_loss) == ("2", "listwise")
    with pytest.raises(ValueError, match="got 'few'"):
        train.parse(["--config", str(file), "--negatives", "few"])


# ---------------------------------------------------------------------------------------------------- divisions


@pytest.mark.parametrize(("size", "accumulation"), [(2, 3), (1, 5)])
def test_any_division_gives_the_same_steps(tmp_path, size, accumulation):
    trainers = []
    for settings in ({}, {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}):
        trainers.append(trainer_of(tiny_model(), tmp_path, negatives="all", negatives_loss="listwise", **settings))
        trainers[-1].train()
    whole, divided = trainers
    assert whole.state.global_step == divided.state.global_step == 2
    for one, two in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        torch.testing.assert_close(two, one, atol=1e-6, rtol=1e-5)
    for name in (*METRICS, "loss"):
        found = [trainer.state.log_history[1][name] for trainer in trainers]
        assert found[0] == pytest.approx(found[1], abs=1e-5), name
    evaluations = [trainer.evaluate() for trainer in trainers]
    loss, metrics = whole.compute_loss(whole.model, whole.data_collator(ROWS), return_outputs=True)
    for name, value in {**metrics, "loss": loss.item()}.items():
        assert all(found[f"eval_{name}"] == pytest.approx(value, abs=1e-5) for found in evaluations), name


@pytest.mark.distributed
def test_two_processes_give_the_same_steps(tmp_path):
    """The last batch has one row for four places: rows that accelerate repeats must not count, nor their negatives."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += ["--main_process_port", "0", __file__, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    alone = trainer_of(tiny_model(), tmp_path, negatives="all", per_device_train_batch_size=4)
    alone.train()
    torch.testing.assert_close(torch.load(tmp_path / "model.pt"), alone.model.state_dict(), atol=1e-6, rtol=1e-5)
    for found, expected in zip(report["steps"], alone.state.log_history, strict=False):
        for name in (*METRICS, "loss"):
            assert found[name] == pytest.approx(expected[name], abs=1e-5), name
    expected = alone.evaluate()
    for name in (*METRICS, "loss"):
        assert report["eval"][f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-5), name


def two_process_run(folder: Path) -> None:
    """Run in each of the two processes."""
    trainer = trainer_of(tiny_model(), folder, negatives="all", per_device_train_batch_size=2)
    assert trainer.args.world_size == 2
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "model.pt")
        (folder / "report.json").write_text(json.dumps({"steps": trainer.state.log_history[:4], "eval": metrics}))


if __name__ == "__main__":
    two_process_run(Path(sys.argv[1]))
    leave(0)

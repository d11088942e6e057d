"""EPOTrainer: batches against exact tensors, steps against TRL's CPOTrainer, divisions against each other."""

import copy
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from empathic.processes import leave
from empathic.trainers import EPOConfig, EPOTrainer
from empathic.trainers.preference_collator import PairRows, PreferenceCollator

WORDS = "i am so sad today that is great news bad tell me more oh no yes well done user assistant poison".split()
# Ragged on purpose; seven rows, so that no batch size of 2 or 4 divides them.
ROWS = [
    {"prompt": "i am so sad today", "chosen": " oh no tell me more", "rejected": " great"},
    {"prompt": "great news", "chosen": " yes", "rejected": " oh no that is so bad"},
    {"prompt": "i am bad", "chosen": " no", "rejected": " yes"},
    {"prompt": "tell me more", "chosen": " that is so great well done", "rejected": " no no"},
    {"prompt": "oh", "chosen": " tell me", "rejected": " well done well done more"},
    {"prompt": "that is that", "chosen": " yes yes yes yes", "rejected": " i am so sad"},
    {"prompt": "me", "chosen": " more more", "rejected": " bad"},
]
METRICS = (
    "nll_loss",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
    *(f"logps/{name}" for name in ("chosen", "rejected")),
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m.role + (' ' + m.name if 'name' in m else '') + ' ' + m.content"
    " + ' <|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def word_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token per word: ids 0 <pad>, 1 <|im_end|>, 2 <|im_start|>, 3 <s>, then WORDS in order."""
    names = ["<pad>", "<|im_end|>", "<|im_start|>", "<s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        **special,
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, but a + b, and then ab + c, are merged: ids a 0, b 1, c 2, ab 3, abc 4, </s> 5."""
    vocab = {name: i for i, name in enumerate(["a", "b", "c", "ab", "abc", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "c")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def tiny_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,  # so that log-probabilities differ
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def config(tmp_path, **changes) -> EPOConfig:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
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


def train(tmp_path, rows=ROWS, model=None, trainer_class=EPOTrainer, resume=None, **changes):
    """A finished run: the trainer, whose model holds the trained parameters."""
    peft_config = changes.pop("peft_config", None)
    collator = changes.pop("data_collator", None)
    trainer = trainer_class(
        model=model or tiny_model(),
        args=config(tmp_path, **changes),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        peft_config=peft_config,
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_parameters(model, other, **tolerance):
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()), **tolerance)


# ---------------------------------------------------------------------------------------------------- batches


def test_batch_of_plain_rows():
    batch = PreferenceCollator(word_tokenizer())(ROWS[1:3])
    i, am, so, that, is_, great, news, bad = (4 + WORDS.index(w) for w in "i am so that is great news bad".split())
    oh, no, yes = (4 + WORDS.index(w) for w in ("oh", "no", "yes"))
    expected = [
        [great, news, yes, 1, 0, 0, 0, 0, 0],
        [i, am, bad, no, 1, 0, 0, 0, 0],
        [great, news, oh, no, that, is_, so, bad, 1],
        [i, am, bad, yes, 1, 0, 0, 0, 0],
    ]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 9, 5]
    assert batch["labels"].tolist() == [
        [-100, -100, yes, 1, *[-100] * 5],
        [-100, -100, -100, no, 1, *[-100] * 4],
        [-100, -100, oh, no, that, is_, so, bad, 1],
        [-100, -100, -100, yes, 1, *[-100] * 4],
    ]
    assert batch["row_ids"].tolist() == [0, 1] and batch["left_out"] == []
    assert batch["logits_to_keep"] == 8  # from position 1, which predicts the first reply token of row 1, to the end


def test_bos_and_eos_are_written_once():
    collate = PreferenceCollator(word_tokenizer(bos_token="<s>"))
    batch = collate([{"prompt": "<s> oh", "chosen": " no <|im_end|>", "rejected": " no"}])
    oh, no = (4 + WORDS.index(w) for w in ("oh", "no"))
    assert batch["input_ids"].tolist() == [[3, oh, no, 1]] * 2
    batch = collate([{"prompt": "oh", "chosen": "", "rejected": " no"}])
    assert batch["input_ids"].tolist() == [[3, oh, 1, 0], [3, oh, no, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 1, -100], [-100, -100, no, 1]]


def test_reply_starts_where_the_tokens_of_the_prompt_end():
    """'a' + 'bb' is tokenized as 'ab' 'b': the prompt's own token is gone, and 'ab' belongs to the reply."""
    batch = PreferenceCollator(merging_tokenizer())([{"prompt": "ca", "chosen": "bb", "rejected": "cb"}])
    assert batch["input_ids"].tolist() == [[2, 3, 1, 5, 5], [2, 0, 2, 1, 5]]
    assert batch["labels"].tolist() == [[-100, 3, 1, 5, -100], [-100, -100, 2, 1, 5]]


def test_conversational_rows_end_with_one_eos():
    rows = [
        {
            "prompt": [{"role": "user", "name": "me", "content": "i am so sad"}],
            "chosen": [{"role": "assistant", "content": reply}],
            "rejected": [{"role": "assistant", "content": "great news"}],
        }
        for reply in ("oh no", "tell me more <|im_end|>")  # an EOS written by the user must not be doubled either
    ]
    tokenizer = word_tokenizer()
    batch = PreferenceCollator(tokenizer)(rows)
    for sequence, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert tokenizer.decode(sequence[labels == -100][:7]) == "<|im_start|> user me i am so sad"
        target = labels[labels != -100].tolist()
        assert target.count(tokenizer.eos_token_id) == 1 and target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == "oh no <|im_end|>"
    # Generation starts from the same prompt tokens.
    start = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True, return_dict=False)
    assert batch["input_ids"][0, : len(start)].tolist() == start

    # Arrow fills `name` with None where only other messages have one; the batch must not change.
    stored = Dataset.from_list([{**row, "chosen": [{**row["chosen"][0], "name": None}]} for row in rows])
    torch.testing.assert_close(PreferenceCollator(tokenizer)(list(stored))["input_ids"], batch["input_ids"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a b", "rejected": "a c"}, r"Row 3 has the keys \['chosen', 'rejected'\].*implicit prompt"),
        ({"prompt": "a", "text": "b"}, r"Row 3 has the keys \['prompt', 'text'\]"),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}, "Row 3: .*'chosen': 'str'"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "Row 3: .*'chosen': 'NoneType'"),
        ({"prompt": [], "chosen": [], "rejected": []}, "Row 3: prompt is an empty list"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": [], "rejected": []},
            r"Row 3: chosen must be one assistant message, got the roles \[\]",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        PreferenceCollator(word_tokenizer())([*ROWS[:3], row])


def test_bad_data_sets_are_refused(tmp_path):
    def build(rows):
        EPOTrainer(tiny_model(), config(tmp_path), train_dataset=rows, processing_class=word_tokenizer())

    with pytest.raises(ValueError, match="Row 0 has the keys"):
        build([{"chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="train data set is empty"):
        build([])
    with pytest.raises(ValueError, match="no length"):
        build(iter(ROWS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "beta must be a finite number above 0, got 0"),
        ({"gamma": -1.0}, "gamma must .* got -1.0"),
        ({"beta": "1e-6"}, "beta must .* got '1e-6'"),
        ({"nll_weight": float("nan")}, "nll_weight must .* got nan"),
        ({"nll_weight": 0, "epo_weight": 0}, "nothing to train"),
        ({"max_length": 1}, "max_length must .* got 1"),
        ({"history": "audio"}, "history must .* got 'audio'"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
    ],
)
def test_config_names_the_bad_value(settings, message):
    with pytest.raises(ValueError, match=message):
        EPOConfig(**settings)


def test_defaults_are_the_papers():
    args = EPOConfig()
    assert (args.beta, args.gamma, args.learning_rate, args.nll_weight, args.epo_weight) == (2.0, 0.5, 1e-6, 1.0, 1.0)


# ---------------------------------------------------------------------------------------------------- against TRL


def trl_trainer(tmp_path, model, rows, tokenizer, **changes):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(
        **{key: value for key, value in config(tmp_path).to_dict().items() if key in CPOConfig.__dataclass_fields__}
        | {"loss_type": "simpo", "cpo_alpha": 1.0, "beta": 2.0, "simpo_gamma": 0.5, "bf16": False}
        | {"gradient_checkpointing": False, "max_length": 1024, "report_to": "none"}
        | changes
    )
    return CPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


JOINED = [
    {"prompt": "ca", "chosen": "bb", "rejected": "cb"},
    {"prompt": "bab", "chosen": "cab", "rejected": "c"},
    {"prompt": "cc", "chosen": "abcab", "rejected": "b"},
]


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [(word_tokenizer(), ROWS), (word_tokenizer(bos_token="<s>"), ROWS), (merging_tokenizer(), JOINED)],
    ids=["words", "bos", "merges"],
)
def test_loss_and_gradients_are_trls(tmp_path, tokenizer, rows):
    theirs, ours = tiny_model(), tiny_model()
    reference = trl_trainer(tmp_path, theirs, rows, tokenizer)
    batch = reference.data_collator([reference.train_dataset[i] for i in range(len(rows))])
    expected = reference.compute_loss(theirs, batch)
    expected.backward()

    trainer = EPOTrainer(ours, config(tmp_path), train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator(rows)
    before = copy.deepcopy(batch)
    loss, metrics = trainer.compute_loss(ours, batch, return_outputs=True)
    loss.backward()
    torch.testing.assert_close(batch, before)  # untouched
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name in METRICS:
        assert metrics[name] == pytest.approx(reference._stored_metrics["train"][name][0], abs=1e-5), name


def test_a_training_step_logs_what_trl_logs(tmp_path):
    theirs, ours = tiny_model(), tiny_model()
    reference = trl_trainer(tmp_path, theirs, ROWS[:4], word_tokenizer())
    reference.train()
    trainer = train(tmp_path, ROWS[:4], ours)
    for name in (*METRICS, "loss", "grad_norm"):
        assert trainer.state.log_history[0][name] == pytest.approx(reference.state.log_history[0][name], abs=1e-4), name
    assert_same_parameters(ours, theirs, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- divisions


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """One epoch over 7 pairs in undivided steps of 4 and 3 pairs."""
    return train(tmp_path_factory.mktemp("undivided"), per_device_train_batch_size=4)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), (1, 4)])
def test_any_division_gives_the_same_steps(tmp_path, undivided, size, accumulation):
    assert undivided.state.global_step == 2
    assert any(
        not torch.equal(a, b) for a, b in zip(undivided.model.parameters(), tiny_model().parameters(), strict=True)
    )
    divided = train(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert_same_parameters(divided.model, undivided.model, atol=1e-6, rtol=1e-5)
    for step in (0, 1):
        for name in (*METRICS, "loss"):
            expected = undivided.state.log_history[step][name]
            assert divided.state.log_history[step][name] == pytest.approx(expected, abs=1e-5), name


def two_process_run(folder: Path) -> None:
    """Run in each of the two processes: the same epoch in two divisions, then an evaluation."""
    report = {}
    for size, accumulation in [(2, 1), (1, 2)]:
        trainer = train(folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        assert trainer.args.world_size == 2
        assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
        metrics = trainer.evaluate(ROWS)
        if trainer.is_world_process_zero():
            torch.save(trainer.model.state_dict(), folder / f"model{size}.pt")
            report[size] = {"steps": trainer.state.log_history[:2], "eval": metrics}
    # A run with one row that is too long, which only one process reads.
    trainer = train(folder, per_device_train_batch_size=2, max_length=10)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "left_out.pt")
        report["left_out"] = trainer.state.log_history[-1]
        (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.distributed
def test_two_processes_give_the_same_steps(tmp_path, undivided):
    """The last batch has 3 pairs for 4 places: the pair that accelerate repeats must not count."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(
        [*command, "--main_process_port", "0", __file__, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    single = undivided.evaluate(ROWS)
    for size in ("2", "1"):
        trained = torch.load(tmp_path / f"model{size}.pt")
        torch.testing.assert_close(trained, undivided.model.state_dict(), atol=1e-6, rtol=1e-5)
        for step in (0, 1):
            for name in (*METRICS, "loss"):
                expected = undivided.state.log_history[step][name]
                assert report[size]["steps"][step][name] == pytest.approx(expected, abs=1e-5), name
        for name in (*METRICS, "loss"):
            assert report[size]["eval"][f"eval_{name}"] == pytest.approx(single[f"eval_{name}"], abs=1e-5), name
    assert report["left_out"]["left_out_pairs"] == 1
    alone = train(tmp_path / "alone", max_length=10)
    torch.testing.assert_close(torch.load(tmp_path / "left_out.pt"), alone.model.state_dict(), atol=1e-6, rtol=1e-5)


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path):
    results = []
    for size in (1, 2, 7):
        trainer = EPOTrainer(
            tiny_model(),
            config(tmp_path, per_device_eval_batch_size=size),
            eval_dataset={"held": ROWS},
            processing_class=word_tokenizer(),
        )
        results.append(trainer.evaluate())
        loss, metrics = trainer.compute_loss(trainer.model, trainer.data_collator(ROWS), return_outputs=True)
        assert results[-1]["eval_held_loss"] == pytest.approx(loss.item(), abs=1e-5)
        for name in METRICS:
            assert results[-1][f"eval_held_{name}"] == pytest.approx(metrics[name], abs=1e-5), name
            assert results[-1][f"eval_held_{name}"] == pytest.approx(results[0][f"eval_held_{name}"], abs=1e-5), name
    assert trainer.predict(ROWS).metrics["test_loss"] == pytest.approx(results[0]["eval_held_loss"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- training


def test_training_widens_the_margin_and_the_control_does_not_see_the_rejected(tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 3e-3, "num_train_epochs": 10}
    before = train(tmp_path, learning_rate=0.0).evaluate(ROWS)
    after = train(tmp_path, **settings).evaluate(ROWS)
    assert after["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.5
    assert after["eval_nll_loss"] < before["eval_nll_loss"]

    control = train(tmp_path, epo_weight=0.0, **settings)
    other = train(tmp_path, [{**row, "rejected": " news"} for row in ROWS], epo_weight=0.0, **settings)
    # One batch may be padded more than the other, so the sums are not bitwise the same.
    assert_same_parameters(control.model, other.model, atol=2e-4, rtol=1e-3)
    first = control.state.log_history[0]
    assert first["loss"] == pytest.approx(first["nll_loss"], abs=1e-6)
    assert control.evaluate(ROWS)["eval_rewards/margins"] < after["eval_rewards/margins"]


def test_compute_loss_outside_of_training_leaves_no_trace_in_the_logs(tmp_path, undivided):
    model = tiny_model()
    trainer = EPOTrainer(model, config(tmp_path), train_dataset=ROWS, processing_class=word_tokenizer())
    trainer.compute_loss(model, trainer.data_collator(ROWS[:2]))
    trainer.train()
    assert trainer.state.log_history[0]["logps/chosen"] == undivided.state.log_history[0]["logps/chosen"]


def test_too_long_pairs_are_left_out_and_reported(tmp_path, caplog):
    """Rows 0 and 3 are too long; the run equals a run on the other two rows."""
    with caplog.at_level(logging.WARNING, logger="empathic.trainers.epo_trainer"):
        trainer = train(tmp_path, ROWS[:4], max_length=9, num_train_epochs=2, logging_steps=1)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("empathic")]
    assert len(lines) == 3, lines  # two rows, once each although there are two epochs, and the count
    assert "train row 0 is left out: prompt + chosen have 11 tokens, more than max_length=9" in "\n".join(lines)
    assert "train row 3 is left out: prompt + chosen have 10 tokens" in "\n".join(lines)
    assert lines[-1] == "2 of 4 train pairs were left out."
    assert trainer.state.log_history[-1]["left_out_pairs"] == 2
    others = train(tmp_path, [ROWS[1], ROWS[2]], num_train_epochs=2)
    assert_same_parameters(trainer.model, others.model, atol=1e-6, rtol=1e-5)
    metrics = trainer.evaluate(ROWS[:4])
    assert metrics["eval_left_out_pairs"] == 2
    assert metrics["eval_loss"] == pytest.approx(others.evaluate(ROWS[1:3])["eval_loss"], abs=1e-5)


def test_leaving_out_every_pair_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="All of the 7 train pairs were left out"):
        train(tmp_path, max_length=2)
    trainer = EPOTrainer(tiny_model(), config(tmp_path, max_length=2), processing_class=word_tokenizer())
    with pytest.raises(ValueError, match="All of the 7 eval pairs were left out"):
        trainer.evaluate(ROWS)


def test_an_adapter_is_not_begun_anew(tmp_path, add_adapter):
    """transformers adds an adapter to the model itself, where PEFT would overwrite it."""
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    model = tiny_model()
    add_adapter(model, adapter)
    with pytest.raises(ValueError, match=r"already has an adapter.*load_model\(folder, trainable=True\)"):
        train(tmp_path, model=model, peft_config=adapter)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has no trainable parameter.*load_model\(folder, trainable=True\)"):
        train(tmp_path, model=model)


def test_nan_names_the_rows(tmp_path):
    rows = [*ROWS[:2], {**ROWS[2], "prompt": "poison"}, ROWS[3]]
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[4 + WORDS.index("poison")] = float("nan")
    with pytest.raises(FloatingPointError, match=re.escape("rows [2, 3]; the cause is in the rows [2]")):
        train(tmp_path, rows, model, per_device_train_batch_size=2, train_sampling_strategy="sequential")


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_peft_trains_the_adapter_only(tmp_path, settings):
    adapter = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    trainer = train(tmp_path, peft_config=adapter, gradient_accumulation_steps=2, **settings)
    original = dict(tiny_model().named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # starts at zero
            assert parameter.abs().sum() > 0, name
        elif "lora_A" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            torch.testing.assert_close(parameter, original[name], msg=name)
    plain = train(tmp_path, peft_config=adapter, gradient_accumulation_steps=2)  # dropout off: the runs agree
    tolerance = 0.05 if "bf16" in settings else 1e-5
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], abs=tolerance)
    trainer.save_model(tmp_path / "saved")
    assert (tmp_path / "saved/adapter_model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- randomness


class SeedCollator(PreferenceCollator):
    """Shows the sampling seeds in `row_ids`, as epoch * 100 + row."""

    def __call__(self, rows):
        seeds = [row["sampling_seed"] for row in rows]
        assert all(seed[0] == 42 and seed[2] == row["row_id"] for seed, row in zip(seeds, rows, strict=True))
        return {**super().__call__(rows), "row_ids": torch.tensor([100 * seed[1] + seed[2] for seed in seeds])}


class SeedTrainer(EPOTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        self.seen = [*self.__dict__.get("seen", []), *inputs["row_ids"].tolist()]
        return super().compute_loss(model, inputs, **kwargs)


def test_every_row_has_its_own_seed_each_epoch_and_a_resumed_run_goes_on_with_them(tmp_path):
    settings = {
        "trainer_class": SeedTrainer,
        "data_collator": SeedCollator(word_tokenizer()),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = train(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, **settings)
    assert len(whole.seen) == 21
    for epoch in range(3):
        assert sorted(whole.seen[7 * epoch : 7 * epoch + 7]) == [100 * epoch + row for row in range(7)]
    resumed = train(tmp_path, model=tiny_model(1), resume=str(tmp_path / "checkpoint-6"), **settings)
    assert resumed.seen == whole.seen[11:]  # 6 steps: 7 pairs of the first epoch and 4 of the second
    assert_same_parameters(resumed.model, whole.model, atol=0, rtol=0)
    assert PairRows(ROWS, "eval")[3]["sampling_seed"] is None


# ---------------------------------------------------------------------------------------------- columns, names, dropout

CHAT_ROW = {
    "prompt": [{"role": "user", "content": "i am so sad"}],
    "chosen": [{"role": "assistant", "content": "oh no"}],
    "rejected": [{"role": "assistant", "content": "great"}],
}
TOOL = {"type": "function", "function": {"name": "poison", "description": None, "parameters": {"type": "object"}}}


def test_tools_and_chat_template_kwargs_reach_the_template(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].function.name + ' ' }}{% endif %}{% if mood %}{{ mood + ' ' }}{% endif %}" + CHATML
    )
    plain = tokenizer.apply_chat_template(CHAT_ROW["prompt"], tokenize=False)
    for extra, shown in (
        ({"tools": [TOOL]}, "poison "),
        ({"tools": json.dumps([TOOL])}, "poison "),
        ({"chat_template_kwargs": {"mood": "sad"}}, "sad "),
        ({"tools": None, "chat_template_kwargs": None}, ""),
    ):
        rows = Dataset.from_list([{**CHAT_ROW, **extra}] * 2)
        trainer = EPOTrainer(tiny_model(), config(tmp_path), train_dataset=rows, processing_class=tokenizer)
        ids = trainer.data_collator([trainer.train_dataset[0]])["input_ids"]
        expected = tokenizer(shown + plain, add_special_tokens=False)["input_ids"]
        assert ids[:, : len(expected)].tolist() == [expected] * 2


@pytest.mark.parametrize("column, value", [("images", ["a.png"]), ("video", "a.mp4"), ("system", "be kind")])
def test_a_column_of_inputs_that_would_be_ignored_is_refused_by_name(tmp_path, column, value):
    rows = [CHAT_ROW, {**CHAT_ROW, column: None}, {**CHAT_ROW, column: value}]
    for data in (rows, Dataset.from_list([{column: None, **row} for row in rows])):
        with pytest.raises(ValueError, match=f"Row 2 of the train data set has the column {column}"):
            EPOTrainer(tiny_model(), config(tmp_path), train_dataset=data, processing_class=word_tokenizer())
    with pytest.raises(ValueError, match=f"Row 0 of the eval data set has the column {column}"):
        EPOTrainer(tiny_model(), config(tmp_path), eval_dataset=rows[2:], processing_class=word_tokenizer())
    with pytest.raises(ValueError, match=f"Row 2 has the column {column}"):
        PreferenceCollator(word_tokenizer())(rows)
    PreferenceCollator(word_tokenizer())(rows[:2])


def test_tools_of_a_plain_prompt_are_refused_and_other_columns_are_named(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"column tools.*a string has no chat template"):
        PreferenceCollator(word_tokenizer())([{**ROWS[0], "tools": [TOOL]}])
    EPOTrainer(
        tiny_model(),
        config(tmp_path),
        train_dataset=[{**row, "score": 1, "corpus": "a"} for row in ROWS],
        processing_class=word_tokenizer(),
    )
    assert "The train data set has columns that are not used: score." in caplog.text


@pytest.mark.parametrize("content", [None, [{"type": "image", "path": "a.png"}]])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_content_that_a_text_model_cannot_read_is_an_error_with_the_row(column, content):
    row = {**CHAT_ROW, column: [{**CHAT_ROW[column][0], "content": content}]}
    with pytest.raises(ValueError, match=f"Row 0: a message of {column} has"):
        PreferenceCollator(word_tokenizer())([row])


def test_a_model_is_loaded_by_its_name_as_in_trl(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    trainer = EPOTrainer(
        str(tmp_path / "model"),
        config(tmp_path, model_init_kwargs={"dtype": "float64"}),
        train_dataset=ROWS,
    )
    assert trainer.model.dtype == torch.float64 and trainer.processing_class.eos_token == "<|im_end|>"
    for loaded, saved in zip(trainer.model.parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(loaded, saved.double())
    trainer = EPOTrainer(tmp_path / "model", config(tmp_path), train_dataset=ROWS, peft_config=LoraConfig(r=2))
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = EPOTrainer(
        str(tmp_path / "adapter"), config(tmp_path), train_dataset=ROWS, processing_class=word_tokenizer()
    )
    assert any(p.requires_grad for name, p in again.model.named_parameters() if "lora_A" in name)
    with pytest.raises(ValueError, match=r"model_init_kwargs is \{'dtype': 'float64'\}, but the model is already"):
        EPOTrainer(tiny_model(), config(tmp_path, model_init_kwargs={"dtype": "float64"}), train_dataset=ROWS)
    with pytest.raises(TypeError, match="model is a dict"):
        EPOTrainer({}, config(tmp_path), train_dataset=ROWS, processing_class=word_tokenizer())


def test_disable_dropout_reaches_the_rates_that_are_passed_to_functions(tmp_path, caplog):
    def losses(disable, **rates):
        model = tiny_model()
        for name, rate in rates.items():
            setattr(model.config, name, rate)
        model = Qwen2ForCausalLM(model.config)
        model.load_state_dict(tiny_model().state_dict())
        trainer = EPOTrainer(
            model, config(tmp_path, disable_dropout=disable), train_dataset=ROWS, processing_class=word_tokenizer()
        )
        trainer.model.train()
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        return trainer.model, [trainer.compute_loss(trainer.model, batch).item() for _ in range(2)]

    _, plain = losses(True)
    model, first = losses(True, attention_dropout=0.5)
    _, second = losses(False, attention_dropout=0.5)
    assert first == plain and second[0] != second[1]
    assert model.model.layers[0].self_attn.attention_dropout == model.config.attention_dropout == 0
    peft_config = LoraConfig(r=2, lora_dropout=0.3)
    EPOTrainer(
        tiny_model(), config(tmp_path), train_dataset=ROWS, processing_class=word_tokenizer(), peft_config=peft_config
    )
    assert "lora_dropout is 0.3, but disable_dropout sets it to 0" in caplog.text


if __name__ == "__main__":
    two_process_run(Path(sys.argv[1]))
    leave(0)

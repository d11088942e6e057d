"""The same random weights and the same pairs, given to EPOTrainer and to TRL's trainers."""

import copy
import os
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from accelerate.utils import send_to_device
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer

from empathic.benchmarks.shapes import preset_config
from empathic.benchmarks.step_costs import Side
from empathic.trainers.epo_config import EPOConfig
from empathic.trainers.epo_trainer import EPOTrainer

OURS, CPO, DPO = "EPOTrainer", "CPOTrainer", "DPOTrainer"
FULL, SMALL = 151_936, 5_000  # entries of Qwen2.5-7B's vocabulary; that with the head's share at 7B in the small model
BETA, GAMMA = 2.0, 0.5
FIRST_ID = 2  # of words; below are the end of a reply and padding


@dataclass(frozen=True)
class Case:
    """
    Pairs of one batch, and what is wanted of them.

    Args:
        name: in tables.
        lengths: tokens of prompt, chosen and rejected of each pair; each reply's last one is its end.
        vocabulary: entries of the embedding and of the head.
        checkpointing: whether layers are computed again in the backward pass.
        exact: also compared in fp64, which takes twice the memory.
        wanted: the largest ratio of ours to TRL's, by quantity.
    """

    name: str
    lengths: tuple[tuple[int, int, int], ...]
    vocabulary: int = FULL
    checkpointing: bool = False
    exact: bool = True
    wanted: dict[str, float] = field(default_factory=dict)

    def scaled(self, divisor: int, vocabulary: int) -> "Case":
        """With lengths and vocabulary for a tiny model."""
        lengths = tuple(tuple(max(2, tokens // divisor) for tokens in pair) for pair in self.lengths)
        return replace(self, lengths=lengths, vocabulary=vocabulary)


@dataclass(frozen=True)
class Preset:
    """A language model, its adapter's rank and the vocabularies of the cases; lengths are divided by `divisor`."""

    config: Qwen2Config
    rank: int
    full: int = FULL
    small: int = SMALL
    divisor: int = 1
    dtype: str = "float32"


def _config(hidden: int, inner: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        initializer_range=0.06,  # three times the usual: logits then spread about as those of a trained model do
    )


def preset(name: str) -> Preset:
    """
    `small`: Qwen2.5-7B's proportions at a width of 384. With 8 layers, a head with 5,000 entries has 7% of the
    operations of a step with P 180 and C 30, as the whole head has in the 7B model.
    """
    if name == "tiny":
        return Preset(_config(32, 64, 2, heads=4), rank=2, full=1000, small=200, divisor=16)
    if name == "small":
        return Preset(_config(384, 2016, 8, heads=6), rank=12)
    return Preset(preset_config(name).text_config, rank=128, dtype="bfloat16")


def build(chosen: Preset, vocabulary: int, device: str) -> PeftModel:
    """
    A language model with random weights that lie frozen, the head too, and a LoRA adapter on all its linear layers but
    the head that trains. Both matrices of the adapter are random, so that every parameter has a gradient.
    """
    set_seed(0)
    config = copy.deepcopy(chosen.config)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = vocabulary, None, 0, 1
    lora = LoraConfig(
        r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules="all-linear", init_lora_weights=False, lora_dropout=0
    )
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, chosen.dtype))
        return get_peft_model(model, lora).train()


def copy_of(model: nn.Module) -> nn.Module:
    """A copy with an adapter of its own over the same frozen weights."""
    shared = {id(value): value for value in model.parameters() if not value.requires_grad}
    return copy.deepcopy(model, memo=shared)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Each number below `vocabulary` is a token of its own, so that strings have exact lengths."""
    words = {"<end>": 0, "<pad>": 1, **{str(number): number for number in range(FIRST_ID, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def make_rows(case: Case) -> list[dict]:
    """Plain preference rows of random words. (TRL ends replies of conversational rows twice.)"""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        ids = torch.randint(FIRST_ID, case.vocabulary, (count,), generator=generator)
        return "".join(f" {number}" for number in ids.tolist())

    # Every reply is one word shorter than its length: the trainers end it.
    return [
        {"prompt": words(prompt).strip(), "chosen": words(chosen - 1), "rejected": words(rejected - 1)}
        for prompt, chosen, rejected in case.lengths
    ]


def make_sides(model: PeftModel, case: Case, rows: list[dict], folder: str, with_dpo: bool = False) -> list[Side]:
    """
    EPOTrainer, TRL's experimental CPOTrainer with the same loss and, if asked for, TRL's DPOTrainer.

    The latter has another loss. Its reference's log-probabilities are given, as if they had been computed beforehand,
    which is its fastest way.
    """
    device, dtype = model.device, next(model.parameters()).dtype
    tokenizer = word_tokenizer(case.vocabulary)
    common = {
        "output_dir": folder,
        "beta": BETA,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": len(rows),
    }
    # Nothing is cut: TRL's limit is past the longest pair.
    theirs = common | {
        "max_length": max(prompt + max(chosen, rejected) for prompt, chosen, rejected in case.lengths) + 1,
        "gradient_checkpointing": case.checkpointing,
    }
    args = EPOConfig(**common, gamma=GAMMA, activation_checkpointing=case.checkpointing)
    trainers = {OURS: EPOTrainer(copy_of(model), args, processing_class=tokenizer)}
    args = CPOConfig(**theirs, loss_type="simpo", cpo_alpha=1.0, simpo_gamma=GAMMA, remove_unused_columns=False)
    data = Dataset.from_list(rows)
    trainers[CPO] = CPOTrainer(copy_of(model), args, train_dataset=data, processing_class=tokenizer)
    if with_dpo:
        args = DPOConfig(**theirs, loss_type="sigmoid")
        trainers[DPO] = DPOTrainer(copy_of(model), args=args, train_dataset=data, processing_class=tokenizer)
        trainers[DPO].precompute_ref_logps = True
    return [_side(name, trainer, rows, case.checkpointing) for name, trainer in trainers.items()]


def _side(name: str, trainer, rows: list[dict], checkpointing: bool) -> Side:
    """The trainer and its batch as they are when `train()` takes its first step."""
    items = rows if name == OURS else [trainer.train_dataset[index] for index in range(len(rows))]
    batch = send_to_device(trainer.data_collator(items), trainer.args.device)
    if name == DPO:
        batch |= {
            f"ref_{side}_logps": torch.zeros(len(rows), device=trainer.args.device) for side in ("chosen", "rejected")
        }
    model = trainer.model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    return Side(name, trainer.accelerator.prepare_model(model), batch, trainer.compute_loss)


def operations_of(model: nn.Module, case: Case, shared: bool) -> float:
    """
    Operations of the matrix products of a step, from sizes alone: forward, the gradients of all inputs but the
    embedding's output, those of the weights that train; nothing computed again. Attention is counted in full.

    Args:
        model: as `build` makes it; it may lie on the meta device.
        case: whose batch it is.
        shared: each prompt once and the head at the replies' tokens only, which is what the mathematics needs; else two
            padded rows a pair and the head at every position, as CPOTrainer has them.
    """
    config, base = model.config, model.get_base_model()
    longest = max(prompt + max(replies) for prompt, *replies in case.lengths)
    positions, targets, scores = 0, 0, 0
    for prompt, chosen, rejected in case.lengths:
        if shared:
            positions += prompt + chosen + rejected
            targets += chosen + rejected
            scores += prompt**2 + chosen * (prompt + chosen) + rejected * (prompt + rejected)
        else:
            positions, targets, scores = positions + 2 * longest, targets + 2 * longest, scores + 2 * longest**2
    head = base.get_output_embeddings()
    total = 2.0 * head.weight.numel() * targets * (2 + head.weight.requires_grad)
    reads_embedding = tuple(f"layers.0.self_attn.{name}_proj." for name in "qkv")
    for name, module in base.model.named_modules():
        if isinstance(module, nn.Linear):
            passes_on = not name.startswith(reads_embedding) or "lora_B" in name
            total += 2.0 * module.weight.numel() * positions * (1 + passes_on + module.weight.requires_grad)
    width = config.hidden_size  # of all query heads together
    return total + 3 * 4.0 * scores * width * config.num_hidden_layers

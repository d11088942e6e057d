"""Build EPOTrainer, TRL's trainers and the anchors on the same random weights and the same pairs."""

import copy
import os
from dataclasses import dataclass, field, replace
from typing import Any

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

from ..trainers.compat import enable_activation_checkpointing
from ..trainers.epo_config import EPOConfig
from ..trainers.epo_trainer import EPOTrainer
from .preference_anchors import FUSED, FUSED_REPLIES, LIGER, fused_head_loss, liger_loss, unavailable
from .shapes import preset_config
from .step_costs import Side

OURS, CPO, DPO = "EPOTrainer", "CPOTrainer", "DPOTrainer"
UNSHARED = "EPOTrainer, prompts twice"
# From CPOTrainer to EPOTrainer, each saving after the other: no tensor of all logits, by TRL or Liger; the head at the
# replies only; no padding; each prompt once.
LADDER = (CPO, FUSED, LIGER, FUSED_REPLIES, UNSHARED, OURS)
# Vocabulary sizes: Qwen2.5-7B's, and the size that gives the head of the small model the same share as in the 7B model.
FULL, SMALL = 151_936, 5_000
BETA, GAMMA = 2.0, 0.5
FIRST_ID = 2  # first id of the words, after the end-of-reply and padding tokens


@dataclass(frozen=True)
class Case:
    """
    A batch of pairs, and the required ratios.

    Args:
        name: name in tables.
        lengths: tokens of prompt, chosen and rejected of each pair, including the end token of each reply.
        vocabulary: entries of the embedding and of the head.
        checkpointing: whether layers are recomputed in the backward pass.
        exact: whether to compare in fp64 too, which needs twice the memory.
        wanted: maximum ratio of ours to TRL's, by quantity.
    """

    name: str
    lengths: tuple[tuple[int, int, int], ...]
    vocabulary: int = FULL
    checkpointing: bool = False
    exact: bool = True
    wanted: dict[str, float] = field(default_factory=dict)

    def scaled(self, divisor: int, vocabulary: int) -> "Case":
        """Return the case with lengths and vocabulary for a tiny model."""
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
        initializer_range=0.06,  # three times the default, so that the logits are spread about as in a trained model
    )


def preset(name: str) -> Preset:
    """
    Return a preset. `small` has Qwen2.5-7B's proportions at width 384. With 8 layers, a head with 5,000 entries has 7%
    of the operations of a step with P 180 and C 30, the same share as the full head in the 7B model.
    """
    if name == "tiny":
        return Preset(_config(32, 64, 2, heads=4), rank=2, full=1000, small=200, divisor=16)
    if name == "small":
        return Preset(_config(384, 2016, 8, heads=6), rank=12)
    return Preset(preset_config(name).text_config, rank=128, dtype="bfloat16")


def build(chosen: Preset, vocabulary: int, device: str) -> PeftModel:
    """
    Build a language model with frozen random weights and a trainable LoRA adapter on all linear layers except the head.
    Both matrices of the adapter are random, so that every parameter has a gradient.
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
    """Copy a model: the copy has its own adapter and shares the frozen weights."""
    shared = {id(value): value for value in model.parameters() if not value.requires_grad}
    return copy.deepcopy(model, memo=shared)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer in which each number below `vocabulary` is a token, so that strings have exact lengths."""
    words = {"<end>": 0, "<pad>": 1, **{str(number): number for number in range(FIRST_ID, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")


def make_rows(case: Case) -> list[dict]:
    """Make plain preference rows of random words. (TRL would add two end tokens in conversational rows.)"""
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> str:
        ids = torch.randint(FIRST_ID, case.vocabulary, (count,), generator=generator)
        return "".join(f" {number}" for number in ids.tolist())

    # Every reply is one word shorter than its length, because the trainers add the end token.
    return [
        {"prompt": words(prompt).strip(), "chosen": words(chosen - 1), "rejected": words(rejected - 1)}
        for prompt, chosen, rejected in case.lengths
    ]


def make_sides(
    model: PeftModel, case: Case, rows: list[dict], folder: str, with_dpo: bool = False, with_anchors: bool = False
) -> list[Side]:
    """
    Build EPOTrainer, TRL's experimental CPOTrainer with the same loss, and optionally TRL's DPOTrainer and the anchors.

    DPOTrainer has a different loss. It gets reference log-probabilities as if they were precomputed, which is its
    fastest mode. The anchors have the same loss: the rest of `LADDER`, without what `unavailable` names, and on a GPU
    without `FUSED_REPLIES`, which there equals `FUSED`.
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
    # Nothing is truncated: TRL's limit is above the longest pair.
    settings = common | {
        "max_length": max(prompt + max(chosen, rejected) for prompt, chosen, rejected in case.lengths) + 1,
        "gradient_checkpointing": case.checkpointing,
    }
    data = Dataset.from_list(rows)

    def ours(share_prompt: bool) -> EPOTrainer:
        args = EPOConfig(**common, gamma=GAMMA, activation_checkpointing=case.checkpointing, share_prompt=share_prompt)
        return EPOTrainer(copy_of(model), args, processing_class=tokenizer)

    def cpo() -> CPOTrainer:
        args = CPOConfig(**settings, loss_type="simpo", cpo_alpha=1.0, simpo_gamma=GAMMA, remove_unused_columns=False)
        return CPOTrainer(copy_of(model), args, train_dataset=data, processing_class=tokenizer)

    sides = [_side(OURS, ours(True), rows, case), _side(CPO, cpo(), rows, case)]
    if with_dpo:
        args = DPOConfig(**settings, loss_type="sigmoid")
        trainer = DPOTrainer(copy_of(model), args=args, train_dataset=data, processing_class=tokenizer)
        trainer.precompute_ref_logps = True
        sides.append(_side(DPO, trainer, rows, case))
    if with_anchors:
        sides.append(_side(UNSHARED, ours(False), rows, case))
        losses = {FUSED: lambda trainer: fused_head_loss(trainer, False), LIGER: liger_loss}
        if device.type != "cuda":
            losses[FUSED_REPLIES] = lambda trainer: fused_head_loss(trainer, True)
        for name, loss in losses.items():
            if name not in unavailable():
                trainer = cpo()
                sides.append(_side(name, trainer, rows, case, loss(trainer)))
    return sides


def _side(name: str, trainer: Any, rows: list[dict], case: Case, compute_loss=None) -> Side:
    """Prepare a trainer and its batch as in the first step of `train()`; `compute_loss`: instead of the trainer's."""
    items = rows if isinstance(trainer, EPOTrainer) else [trainer.train_dataset[index] for index in range(len(rows))]
    batch = send_to_device(trainer.data_collator(items), trainer.args.device)
    if name == DPO:
        batch |= {
            f"ref_{side}_logps": torch.zeros(len(rows), device=trainer.args.device) for side in ("chosen", "rejected")
        }
    model = trainer.model.train()
    if case.checkpointing:
        enable_activation_checkpointing(model)
    return Side(name, trainer.accelerator.prepare_model(model), batch, compute_loss or trainer.compute_loss)


def operations_of(model: nn.Module, case: Case, shared: bool) -> float:
    """
    Count the operations of a step's matrix products from sizes alone: the forward pass, the gradients of all inputs
    except the embedding's output, and the gradients of the trained weights, without recomputation. Attention is counted
    in full.

    Args:
        model: result of `build`; it may be on the meta device.
        case: the case of the batch.
        shared: True counts each prompt once and the head at the replies' tokens only, which is the mathematical
            minimum; False counts two padded rows per pair and the head at every position, as in CPOTrainer.
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
    width = config.hidden_size  # total width of all query heads
    return total + 3 * 4.0 * scores * width * config.num_hidden_layers

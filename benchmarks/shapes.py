"""The models and the batches of the rehearsal: sizes of the public models, random weights, random ids."""

from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import MambaConfig, Qwen2Config
from trl import ModelConfig, get_peft_config

from empathic.configuration_empathic import EmpathicConfig
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.tiny.encoders import audio_config, vision_config
from empathic.trainers.preference_collator import IGNORE
from empathic.trainers.stages import LORA_STAGES, freeze_for_stage, lora_targets

NAME_TOKENS = 4  # of an utterance beside its sentence: the speaker's name, a colon, a line break
IDS = 4  # random ids start here; those below are the tiny preset's placeholders


def preset_config(preset: str) -> EmpathicConfig:
    """
    The configuration of `qwen2.5-7b` or `qwen2.5-0.5b` with CLIP ViT-B/32, Whisper tiny and Mamba-370M, or of a model
    of the tiny preset's sizes. Those of the encoders and the 7B model are `EmpathicConfig`'s defaults.
    """
    if preset == "qwen2.5-7b":
        return EmpathicConfig()
    if preset == "qwen2.5-0.5b":
        text = Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        )
        return EmpathicConfig(text_config=text)
    text = Qwen2Config(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    qformer = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return EmpathicConfig(
        text_config=text,
        vision_config=vision_config(),
        audio_config=audio_config(),
        memory_config=MambaConfig(vocab_size=600, hidden_size=128, num_hidden_layers=2, state_size=16),
        video_qformer_config=qformer,
        audio_qformer_config=qformer,
        num_query_tokens=4,
        video_token_id=0,
        audio_token_id=1,
        memory_token_id=2,
        mem_token_id=600,
    )


@dataclass
class Shapes:
    """
    The shapes of a batch. Every row is as long as the longest would be, so that it is a worst case.

    Args:
        batch_size: samples, or in stage `epo` pairs.
        turns: earlier utterances, and so memory vectors.
        sentence, reply: tokens of an utterance and of a reply, in either vocabulary.
        prompt: tokens of the system prompt and the template.
        queries: vectors of a clip's sound, and as many of its frames.
        frames: frames of a clip.
    """

    batch_size: int
    turns: int = 20
    sentence: int = 30
    reply: int = 40
    prompt: int = 64
    queries: int = 32
    frames: int = 8

    @property
    def memory_length(self) -> int:
        """Tokens that the memory encoder reads in a row; each utterance ends with `<MEM>`."""
        return self.turns * (NAME_TOKENS + self.sentence + 1)

    def rows(self, stage: str) -> int:
        """Sequences of the language model."""
        return 2 * self.batch_size if stage == "epo" else self.batch_size

    def clips(self, stage: str) -> int:
        """Clips that are encoded; a batch without any encodes one, so that every process runs every module."""
        return 1 if stage.startswith("memory") else self.batch_size

    def target(self, stage: str) -> int:
        """Target tokens of a row: a reply, or all utterances."""
        return self.turns * (NAME_TOKENS + self.sentence) if stage.startswith("memory") else self.reply

    def length(self, stage: str) -> int:
        """Positions of the language model in a row."""
        media = 0 if stage.startswith("memory") else 2 * self.queries + self.sentence
        return self.prompt + self.turns + media + self.target(stage)

    def positions(self, stage: str) -> int:
        """Positions that the language model runs; the two replies of a pair share their prompt."""
        return self.batch_size * (self.length(stage) + (self.reply if stage == "epo" else 0))

    def logits(self, stage: str) -> int:
        """Positions of the batch that go through the head."""
        return self.rows(stage) * self.target(stage)


def build(config: EmpathicConfig, dtype: torch.dtype, device: str) -> EmpathicForConditionalGeneration:
    """The model with random weights, made on the device in its dtype, with no copy elsewhere. `meta`: sizes only."""
    with torch.device(device):
        return EmpathicForConditionalGeneration._from_config(config, dtype=dtype)


def prepare(model: EmpathicForConditionalGeneration, stage: str, recipe: dict):
    """Freezes and adapts the model as the training script does for a stage with this recipe."""
    freeze_for_stage(model, stage)
    if stage in LORA_STAGES:
        lora = {key: recipe[key] for key in ("lora_r", "lora_alpha", "lora_dropout") if key in recipe}
        lora |= {"lora_dropout": 0.0} if stage == "epo" else {}  # EPOTrainer turns it off
        adapter = get_peft_config(ModelConfig(use_peft=True, **lora))
        adapter.target_modules = lora_targets(model, None)
        with torch.device(model.device):
            model = get_peft_model(model, adapter)
    for parameter in model.parameters():  # what trains is kept in full precision
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_batch(config: EmpathicConfig, stage: str, shapes: Shapes, seed: int = 0) -> dict:
    """A batch as the stage's collator gives it, with random ids and media."""
    generator = torch.Generator().manual_seed(seed)
    rows, length, target = shapes.rows(stage), shapes.length(stage), shapes.target(stage)
    samples = shapes.batch_size

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(IDS, high, size, generator=generator)

    # Ids in the whole table but its last thousand (of Qwen's: its control tokens and placeholders).
    top = config.text_config.vocab_size
    ids = draw(top - 1000 if top > 2000 else top, rows, length)
    start, has_clip = shapes.prompt, not stage.startswith("memory")
    ids[:, start : start + shapes.turns] = config.memory_token_id
    start += shapes.turns
    if has_clip:
        ids[:, start : start + shapes.queries] = config.audio_token_id
        ids[:, start + shapes.queries : start + 2 * shapes.queries] = config.video_token_id
    ids[samples:, : length - target] = ids[: rows - samples, : length - target]  # the prompt of a pair's two replies
    labels = ids.clone()
    labels[:, : length - target] = IGNORE

    memory = draw(config.memory_config.vocab_size, samples, shapes.memory_length)
    memory[:, shapes.memory_length // shapes.turns - 1 :: shapes.memory_length // shapes.turns] = config.mem_token_id
    size, time = config.vision_config.image_size, 2 * config.audio_config.max_source_positions
    there = torch.full((samples, 1), int(has_clip))
    media = {
        "pixel_values_videos": torch.randn(samples, shapes.frames, 3, size, size, generator=generator) * there[0],
        "video_mask": there.repeat(1, shapes.frames),
        "input_features": torch.randn(samples, config.audio_config.num_mel_bins, time, generator=generator) * there[0],
        "input_features_mask": there.repeat(1, time),
        "memory_input_ids": memory,
        "memory_attention_mask": torch.ones_like(memory),
    }
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if stage == "epo":
        media = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in media.items()}
        batch |= {"row_ids": torch.arange(samples), "left_out": [], "logits_to_keep": target + 1}
    return {**batch, **media}

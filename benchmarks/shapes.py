"""Models and batches of the rehearsal: the sizes of the public models, with random weights and random ids."""

from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import MambaConfig, Qwen2Config
from trl import ModelConfig, get_peft_config

from ..configuration_empathic import EmpathicConfig
from ..modeling_empathic import EmpathicForConditionalGeneration
from ..tiny.encoders import audio_config, vision_config
from ..trainers.losses import IGNORE_INDEX
from ..trainers.stages import LORA_STAGES, freeze_for_stage, lora_targets

NAME_TOKENS = 4  # tokens of an utterance in addition to its sentence: the speaker's name, a colon, a line break
FIRST_ID = 4  # first random id; the ids below are the tiny preset's placeholders


def preset_config(preset: str) -> EmpathicConfig:
    """
    Return the configuration of `qwen2.5-7b` or `qwen2.5-0.5b` with CLIP ViT-B/32, Whisper tiny and Mamba-370M, or of a
    model with the tiny preset's sizes. The 7B model and the encoders are the defaults of `EmpathicConfig`.
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
    The shapes of a batch. All rows have the maximum length, so the batch is a worst case.

    Args:
        batch_size: number of samples, or of pairs in stage `epo`.
        turns: number of earlier utterances, and so of memory vectors.
        sentence, reply: tokens of an utterance and of a reply, in either vocabulary.
        prompt: tokens of the system prompt and the template.
        queries: vectors for a clip's audio, and also for its video.
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
        """Tokens per row for the memory encoder; each utterance ends with `<MEM>`."""
        return self.turns * (NAME_TOKENS + self.sentence + 1)

    def rows(self, stage: str) -> int:
        """Number of sequences for the language model."""
        return 2 * self.batch_size if stage == "epo" else self.batch_size

    def clips(self, stage: str) -> int:
        """Number of encoded clips; a batch without clips encodes one, so that every process runs every module."""
        return 1 if stage.startswith("memory") else self.batch_size

    def target(self, stage: str) -> int:
        """Number of target tokens per row: a reply, or all utterances."""
        return self.turns * (NAME_TOKENS + self.sentence) if stage.startswith("memory") else self.reply

    def length(self, stage: str) -> int:
        """Number of positions of the language model per row."""
        media = 0 if stage.startswith("memory") else 2 * self.queries + self.sentence
        return self.prompt + self.turns + media + self.target(stage)

    def positions(self, stage: str) -> int:
        """Number of positions that the language model processes; the two replies of a pair share their prompt."""
        return self.batch_size * (self.length(stage) + (self.reply if stage == "epo" else 0))

    def logits(self, stage: str) -> int:
        """Number of positions of the batch that pass through the head."""
        return self.rows(stage) * self.target(stage)


def build(config: EmpathicConfig, dtype: torch.dtype, device: str) -> EmpathicForConditionalGeneration:
    """Create the model with random weights directly on the device and in the dtype; on `meta` it has no storage."""
    with torch.device(device):
        return EmpathicForConditionalGeneration._from_config(config, dtype=dtype)


def prepare(model: EmpathicForConditionalGeneration, stage: str, recipe: dict):
    """Freeze the model and add adapters as the training script does for a stage with this recipe."""
    freeze_for_stage(model, stage)
    if stage in LORA_STAGES:
        lora = {key: recipe[key] for key in ("lora_r", "lora_alpha", "lora_dropout") if key in recipe}
        lora |= {"lora_dropout": 0.0} if stage == "epo" else {}  # EPOTrainer disables dropout
        adapter = get_peft_config(ModelConfig(use_peft=True, **lora))
        adapter.target_modules = lora_targets(model, None)
        with torch.device(model.device):
            model = get_peft_model(model, adapter)
    for parameter in model.parameters():  # trained parameters stay in fp32
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_batch(config: EmpathicConfig, stage: str, shapes: Shapes, seed: int = 0) -> dict:
    """Make a batch in the format of the stage's collator, with random ids and media."""
    generator = torch.Generator().manual_seed(seed)
    rows, length, target = shapes.rows(stage), shapes.length(stage), shapes.target(stage)
    samples = shapes.batch_size

    def draw(high: int, *size: int) -> torch.Tensor:
        return torch.randint(FIRST_ID, high, size, generator=generator)

    # Ids from the whole vocabulary, except the last thousand of a large vocabulary (Qwen's control tokens).
    top = config.text_config.vocab_size
    ids = draw(top - 1000 if top > 2000 else top, rows, length)
    start, has_clip = shapes.prompt, not stage.startswith("memory")
    ids[:, start : start + shapes.turns] = config.memory_token_id
    start += shapes.turns
    if has_clip:
        ids[:, start : start + shapes.queries] = config.audio_token_id
        ids[:, start + shapes.queries : start + 2 * shapes.queries] = config.video_token_id
    ids[samples:, : length - target] = ids[: rows - samples, : length - target]  # a pair's two rows share the prompt
    labels = ids.clone()
    labels[:, : length - target] = IGNORE_INDEX

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
    else:
        names = [str(number) for number in range(samples)]
        batch |= {"sample_ids": names, "sample_places": [*range(samples)], "left_out": []}
    return {**batch, **media}

"""Configuration of the empathic model: the four pretrained parts, the Q-formers and the emotions."""

from typing import Any

from transformers import AutoConfig, Blip2QFormerConfig, CLIPVisionConfig, PreTrainedConfig, WhisperConfig

# The paper's seven categories (Sec. 3.1); `calm` appears only in its Tables 4 and 7.
EMOTIONS = ("angry", "disgust", "fearful", "happy", "neutral", "sad", "surprise")

# Ends every utterance in the memory encoder's vocabulary (Sec. 3.2).
MEM_TOKEN = "<MEM>"

# The settings of the number of memory vectors, in the config and in the processor.
MEMORY_SIZE = ("memory_tokens", "memory_rate")

# The settings of what the audio tower makes of a clip.
SOUND_OPTIONS = ("audio_window", "audio_feature_layers")

# What Whisper's encoder gets of a clip: whole windows of 30 seconds, or the clip alone.
AUDIO_WINDOWS = ("full", "clip")

# Arguments of `from_pretrained` that control how files are fetched from the Hub.
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")

# Tells the auto classes where to find the code that is saved with a checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_empathic.EmpathicConfig",
    "AutoModel": "modeling_empathic.EmpathicModel",
    "AutoModelForMultimodalLM": "modeling_empathic.EmpathicForConditionalGeneration",
    "AutoProcessor": "processing_empathic.EmpathicProcessor",
}

# Unused special tokens of known text tokenizers, in order of preference; vectors replace them in the prompt.
PLACEHOLDER_CANDIDATES = {
    "video": ("<|video_pad|>",),
    "audio": ("<|audio_pad|>", "<|vision_pad|>"),
    "memory": ("<|memory_pad|>", "<|image_pad|>"),
}


def _unused_tokens(tokenizer, taken: list) -> str:
    """Name special tokens that look unused: neither the tokenizer uses them, nor its chat template."""
    template = str(tokenizer.chat_template or "")
    used = {value for value in tokenizer.special_tokens_map.values() if isinstance(value, str)}
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    unused = [token for token in special if token not in used and token not in taken and token not in template]
    return f", such as {', '.join(unused[:6])}" if unused else " (it seems to have no unused special token)"


def find_placeholder_tokens(tokenizer, **chosen: str | None) -> dict[str, str]:
    """
    Find the text tokenizer's placeholder token for each modality.

    Args:
        tokenizer: the text LLM's tokenizer. It is not changed, so that the LLM's embedding table never grows.
        chosen: `video=`, `audio=`, `memory=`: a token to use instead of the known candidates.

    Returns:
        `{"video": token, "audio": token, "memory": token}`.

    Raises:
        ValueError: if a token is not in the vocabulary, or would be used for two modalities.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = {}
    for modality, candidates in PLACEHOLDER_CANDIDATES.items():
        candidates = candidates if chosen.get(modality) is None else (chosen[modality],)
        found = [token for token in candidates if token in vocabulary and token not in tokens.values()]
        if not found:
            raise ValueError(
                f"The text tokenizer {tokenizer.name_or_path!r} has none of {list(candidates)} as the placeholder of "
                f"{modality} vectors. Name an unused special token of its vocabulary with `{modality}_token=`"
                f"{_unused_tokens(tokenizer, [*chosen.values(), *tokens.values()])}."
            )
        tokens[modality] = found[0]
    return tokens


def check_layers(layers: list[int] | None, encoder_layers: int) -> None:
    """Raise a ValueError unless `audio_feature_layers` names layers of an encoder, each once, or is None."""
    if layers is None:
        return
    for layer in layers:
        if not 0 <= layer <= encoder_layers:
            raise ValueError(
                f"audio_feature_layers names layer {layer!r}, but Whisper's encoder has the layers 1 to "
                f"{encoder_layers}, and 0 for their input."
            )
    if len(set(layers)) < max(len(layers), 1):
        raise ValueError(f"audio_feature_layers is {layers!r}; name at least one layer, and each once.")


def sound_width(audio_config: PreTrainedConfig, layers: list[int] | None) -> int:
    """Return the width of the audio tower's output for `audio_feature_layers`, which are side by side."""
    return audio_config.d_model * (1 if layers is None else len(layers))


def check_memory_size(memory_tokens: int, memory_rate: int | None) -> None:
    """Raise a ValueError unless both settings of the memory are whole numbers from 1 up; the rate may be None."""
    for name, value in zip(MEMORY_SIZE, (memory_tokens, memory_rate), strict=True):
        is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not is_whole and not (name == "memory_rate" and value is None):
            none = ", or None for none" if name == "memory_rate" else ""
            raise ValueError(f"{name} is {value!r}; give a whole number from 1 up{none}.")


# The configuration class and the default values of each part of the model. transformers has `SubConfigSpec` for this
# purpose from 5.20 on.
_QFORMER = {"num_hidden_layers": 6, "num_attention_heads": 8}
_PARTS = {
    "text_config": (
        AutoConfig,
        {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "rms_norm_eps": 1e-6,
        },
    ),
    "vision_config": (CLIPVisionConfig, {}),
    "audio_config": (
        WhisperConfig,
        {"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
    ),
    "memory_config": (
        AutoConfig,
        {"model_type": "mamba", "vocab_size": 50280, "hidden_size": 1024, "num_hidden_layers": 48},
    ),
    "video_qformer_config": (Blip2QFormerConfig, _QFORMER),
    "audio_qformer_config": (Blip2QFormerConfig, _QFORMER),
}


def _part_config(key: str, value: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Build the configuration of one part from the value that the caller gave."""
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict | None):
        raise TypeError(f"{key} is a {type(value).__name__}; give a configuration, a dict or None.")
    config_class, default = _PARTS[key]
    options = dict(default if value is None else value)
    model_type = options.pop("model_type", default.get("model_type"))
    return AutoConfig.for_model(model_type, **options) if config_class is AutoConfig else config_class(**options)


class EmpathicConfig(PreTrainedConfig):
    r"""
    Configuration of [`EmpathicForConditionalGeneration`]. The defaults are the paper's settings (Sec. 4.2).

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            The LLM, any causal LM of transformers; Qwen2.5-7B by default.
        vision_config (`CLIPVisionConfig` or `dict`, *optional*):
            The CLIP vision tower; ViT-B/32 by default.
        audio_config (`WhisperConfig` or `dict`, *optional*):
            The Whisper model whose encoder is used; Whisper tiny by default.
        memory_config (`MambaConfig`, `Mamba2Config` or `dict`, *optional*):
            The memory encoder; Mamba-370M by default.
        video_qformer_config, audio_qformer_config (`Blip2QFormerConfig` or `dict`, *optional*):
            The Q-formers; 6 layers and 8 heads by default. Their `encoder_hidden_size` follows the towers.
        num_query_tokens (`int`, *optional*, defaults to 32):
            Learnable queries of each Q-former, which is the number of vectors per clip and modality.
        num_frames (`int`, *optional*, defaults to 8):
            Number of frames sampled from a video.
        audio_window (`str`, *optional*, defaults to `"full"`):
            What Whisper's encoder gets: `full` windows of 30 seconds, most of them silence for a short clip, or the
            `clip` alone.
        audio_feature_layers (`list[int]`, *optional*):
            The layers of Whisper's encoder whose outputs the Q-former gets, side by side; 0 is the layers' input. The
            layers after the last of these are not run. By default the output of the whole encoder.
        memory_tokens (`int`, *optional*, defaults to 1):
            Number of memory vectors of an earlier utterance: so many `<MEM>` tokens end it.
        memory_rate (`int`, *optional*):
            If given, an utterance has a memory vector for every `memory_rate` tokens started (of the memory encoder's
            tokenizer, with the speaker's name), and at least `memory_tokens`, so that long utterances get more.
        standardize_features (`bool`, *optional*, defaults to `False`):
            Whether the Q-formers get standardized outputs of the encoders. The first stage measures the mean and the
            deviation of each channel over clips; the checkpoint holds them.
        video_token_id, audio_token_id, memory_token_id (`int`, *optional*):
            Ids of the placeholder tokens in the **text** vocabulary; a prompt has one placeholder per vector.
        mem_token_id (`int`, *optional*):
            Id of `<MEM>` in the **memory encoder's** vocabulary.
        embedding_scale (`float`, *optional*):
            Root mean square of the LLM's embedding entries, the initial scale of the projectors; the text model's
            `initializer_range` by default. `from_parts_pretrained` measures it.

    Raises:
        TypeError: if the value for a part is not a configuration, a dict or None.
        ValueError: if a Q-former's `encoder_hidden_size` is not its tower's width, `audio_window` is unknown,
            `audio_feature_layers` names a layer that is not there or one twice, or `memory_tokens` or `memory_rate` is
            not a whole number from 1 up.
    """

    model_type = "empathic"
    sub_configs = {key: config_class for key, (config_class, _) in _PARTS.items()}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    memory_config: dict | PreTrainedConfig | None = None
    video_qformer_config: dict | PreTrainedConfig | None = None
    audio_qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    num_frames: int = 8
    audio_window: str = "full"
    audio_feature_layers: list[int] | None = None
    memory_tokens: int = 1
    memory_rate: int | None = None
    standardize_features: bool = False
    video_token_id: int = 151656
    audio_token_id: int = 151654
    memory_token_id: int = 151655
    mem_token_id: int = 50277
    embedding_scale: float | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.id2label is None:
            self.id2label = dict(enumerate(EMOTIONS))
        if self.label2id is None:
            self.label2id = {label: int(index) for index, label in self.id2label.items()}
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        qformers = ("video_qformer_config", "audio_qformer_config")
        given = {key: getattr(self, key) for key in qformers}
        for key in self.sub_configs:
            setattr(self, key, _part_config(key, getattr(self, key)))
        super().__post_init__(**kwargs)
        check_layers(self.audio_feature_layers, self.audio_config.encoder_layers)
        widths = self.vision_config.hidden_size, sound_width(self.audio_config, self.audio_feature_layers)
        for key, width in zip(qformers, widths, strict=True):
            qformer = getattr(self, key)
            if given[key] is None or (isinstance(given[key], dict) and "encoder_hidden_size" not in given[key]):
                qformer.encoder_hidden_size = width
            if qformer.encoder_hidden_size != width:
                raise ValueError(
                    f"{key}.encoder_hidden_size is {qformer.encoder_hidden_size}, but its tower's width is {width}. "
                    "Leave it out of the dict to let it follow the tower."
                )
        # Qwen2.5-0.5B ties its embeddings, 7B does not: use the text model's setting.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.audio_window not in AUDIO_WINDOWS:
            raise ValueError(f"audio_window is {self.audio_window!r}; it is one of {', '.join(AUDIO_WINDOWS)}.")
        check_memory_size(self.memory_tokens, self.memory_rate)
        if self.embedding_scale is None:
            self.embedding_scale = self.text_config.initializer_range

    @property
    def sound_options(self) -> dict[str, Any]:
        """The options that determine, besides its weights, what the audio tower makes of a clip."""
        return {name: getattr(self, name) for name in SOUND_OPTIONS}

    @staticmethod
    def attn_implementation_by_part(value: str | dict | None) -> dict | None:
        """
        Choose the attention implementation of each part: BLIP-2's Q-former does not support flash attention and uses
        sdpa instead, and Mamba has no attention. A kernel of the Hub (`owner/name`) counts as flash attention. A `dict`
        by part is returned unchanged.
        """
        if not isinstance(value, str):
            return value
        qformer = "sdpa" if "flash" in value or "/" in value else value
        return {
            "": value,
            "text_config": value,
            "vision_config": value,
            "audio_config": value,
            "video_qformer_config": qformer,
            "audio_qformer_config": qformer,
        }

    @property
    def _attn_implementation(self):
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        PreTrainedConfig._attn_implementation.fset(self, self.attn_implementation_by_part(value))


EmpathicConfig.register_for_auto_class()

# Only the package registers its classes; a checkpoint's copy of this file is found through its `auto_map`.
if __name__ == "empathic.configuration_empathic":
    AutoConfig.register("empathic", EmpathicConfig, exist_ok=True)

__all__ = ["EMOTIONS", "EmpathicConfig"]

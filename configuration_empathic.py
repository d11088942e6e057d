"""Configuration of the empathic model: its four pretrained parts, its Q-formers and its emotions."""

from transformers import AutoConfig, Blip2QFormerConfig, CLIPVisionConfig, PreTrainedConfig, WhisperConfig
from transformers.configuration_utils import SubConfigSpec

# The paper's seven categories (Sec. 3.1). `calm` of its Tables 4 and 7 is not among them.
EMOTIONS = ("angry", "disgust", "fearful", "happy", "neutral", "sad", "surprise")

# Closes every utterance in the memory encoder's vocabulary (Sec. 3.2).
MEM_TOKEN = "<MEM>"

# Arguments of `from_pretrained` that say how to fetch files from the Hub.
HUB_KEYS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")

# Where the auto classes find the code that travels with a checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_empathic.EmpathicConfig",
    "AutoModel": "modeling_empathic.EmpathicModel",
    "AutoModelForMultimodalLM": "modeling_empathic.EmpathicForConditionalGeneration",
    "AutoProcessor": "processing_empathic.EmpathicProcessor",
}

# Tokens of a text tokenizer that no text uses, in order of preference; a vector takes the place of each.
PLACEHOLDER_CANDIDATES = {
    "video": ("<|video_pad|>",),
    "audio": ("<|audio_pad|>", "<|vision_pad|>"),
    "memory": ("<|memory_pad|>", "<|image_pad|>"),
}


def find_placeholder_tokens(tokenizer, **chosen: str | None) -> dict[str, str]:
    """
    The text tokenizer's placeholder token of each modality.

    Args:
        tokenizer: the text LLM's tokenizer; it is not changed, so that its embedding never grows.
        chosen: `video=`, `audio=`, `memory=`: a token to use instead of the known candidates.

    Returns:
        `{"video": token, "audio": token, "memory": token}`.

    Raises:
        ValueError: if a token is not one entry of the vocabulary, or serves two modalities.
    """
    vocabulary = tokenizer.get_vocab()
    tokens = {}
    for modality, candidates in PLACEHOLDER_CANDIDATES.items():
        candidates = candidates if chosen.get(modality) is None else (chosen[modality],)
        found = [token for token in candidates if token in vocabulary and token not in tokens.values()]
        if not found:
            raise ValueError(
                f"The text tokenizer {tokenizer.name_or_path!r} has none of {list(candidates)} to stand for {modality} "
                f"vectors. Name an unused special token of its vocabulary with `{modality}_token=`."
            )
        tokens[modality] = found[0]
    return tokens


class EmpathicConfig(PreTrainedConfig):
    r"""
    Configuration of [`EmpathicForConditionalGeneration`]. The defaults are the paper's (Sec. 4.2).

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
            Learnable queries of each Q-former, and so vectors a clip gives for each modality.
        num_frames (`int`, *optional*, defaults to 8):
            Video frames the model looks at.
        video_token_id, audio_token_id, memory_token_id (`int`, *optional*):
            Placeholders in the **text** vocabulary, one for every vector.
        mem_token_id (`int`, *optional*):
            `<MEM>` in the **memory encoder's** vocabulary.
        embedding_scale (`float`, *optional*):
            Root mean square of the LLM's embedding entries, at which the projectors start; the text model's
            `initializer_range` by default. `from_parts_pretrained` measures it.

    Raises:
        ValueError: if a Q-former's `encoder_hidden_size` is not its tower's width.
    """

    model_type = "empathic"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            AutoConfig,
            model_type="qwen2",
            init_kwargs={
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
        "vision_config": SubConfigSpec(CLIPVisionConfig),
        "audio_config": SubConfigSpec(
            WhisperConfig,
            init_kwargs={"d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536},
        ),
        "memory_config": SubConfigSpec(
            AutoConfig,
            model_type="mamba",
            init_kwargs={"vocab_size": 50280, "hidden_size": 1024, "num_hidden_layers": 48},
        ),
        "video_qformer_config": SubConfigSpec(
            Blip2QFormerConfig, init_kwargs={"num_hidden_layers": 6, "num_attention_heads": 8}
        ),
        "audio_qformer_config": SubConfigSpec(
            Blip2QFormerConfig, init_kwargs={"num_hidden_layers": 6, "num_attention_heads": 8}
        ),
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    memory_config: dict | PreTrainedConfig | None = None
    video_qformer_config: dict | PreTrainedConfig | None = None
    audio_qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    num_frames: int = 8
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
        super().__post_init__(**kwargs)
        for key, width in zip(qformers, (self.vision_config.hidden_size, self.audio_config.d_model), strict=True):
            qformer = getattr(self, key)
            if given[key] is None or (isinstance(given[key], dict) and "encoder_hidden_size" not in given[key]):
                qformer.encoder_hidden_size = width
            if qformer.encoder_hidden_size != width:
                raise ValueError(
                    f"{key}.encoder_hidden_size is {qformer.encoder_hidden_size}, but its tower's width is {width}. "
                    "Leave it out of the dict to let it follow the tower."
                )
        # Qwen2.5-0.5B ties its embeddings, 7B does not: the composite follows its text model.
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        if self.embedding_scale is None:
            self.embedding_scale = self.text_config.initializer_range

    @staticmethod
    def attn_implementation_by_part(value: str | dict | None) -> dict | None:
        """
        Spreads one attention implementation over the parts: BLIP-2's Q-former has no flash attention (it takes sdpa),
        and Mamba has no attention at all. A `dict` by part is passed through.
        """
        if not isinstance(value, str):
            return value
        qformer = "sdpa" if "flash" in value else value
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

# The package registers its classes; a checkpoint's own copy of this file is found through its `auto_map`.
if __name__ == "empathic.configuration_empathic":
    AutoConfig.register("empathic", EmpathicConfig, exist_ok=True)

__all__ = ["EMOTIONS", "EmpathicConfig"]

"""How a model is put together: from four pretrained parts, or from the folder of a training stage and its base."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers import initialization as init
from transformers.utils import cached_file, is_peft_available

from .configuration_empathic import HUB_KEYS, MEM_TOKEN, EmpathicConfig, find_placeholder_tokens
from .memory_empathic import use_exact_layers

# What a training stage leaves: `STAGE_FILE` names the stage, its base and the tensors in `PARTS_FILE`; a PEFT adapter
# stands beside them where the stage trained one.
STAGE_FILE = "empathic_stage.json"
PARTS_FILE = "trained_parts.safetensors"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # of a PEFT model's keys

# Prefixes of the tensors that come from the four pretrained parts; everything else is new in a composed model.
PRETRAINED_PREFIXES = (
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.",
    "model.audio_tower.",
    "model.memory.mamba.",
)

# Arguments of `from_pretrained` that, beside `HUB_KEYS`, say how to fetch files of one repository only.
REPOSITORY_KEYS = ("revision", "subfolder")


def find_file(path: str, name: str, **hub) -> str | None:
    """A file of a local folder or a Hub repository, or None. `hub`: `HUB_KEYS` and `REPOSITORY_KEYS`."""
    return cached_file(
        path, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, **hub
    )


def read_stage(path: str, **hub) -> dict | None:
    """The stage file of a folder or Hub repository: `stage`, `base` (a folder, an id or the four parts), `trained`."""
    file = find_file(str(path), STAGE_FILE, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def resolve_base(path: str, base: str) -> str:
    """A stage's base: a folder named relative to the stage's own, or else as it stands (an absolute path or an id)."""
    beside = Path(path) / base
    return str(beside.resolve()) if beside.is_dir() else base


def check_tensors(file: str, tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size | None]) -> None:
    """
    Compares what a file holds with the shapes that a model has under the same keys (None: it has no such tensor).

    Raises:
        ValueError: naming the keys that are missing, unexpected, or of another shape.
    """
    known = {key: shape for key, shape in shapes.items() if shape is not None}
    problems = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - known.keys()),
        "of another shape": sorted(k for k, v in tensors.items() if k in known and known[k] != v.shape),
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"{file} does not fit the model it was trained on ({found}).")


def load_parts(model, path: str, names: list[str], **hub) -> None:
    """
    Puts the tensors of a stage's `trained_parts.safetensors` into the model.

    Raises:
        ValueError: naming the keys that are missing, unexpected, or of another shape.
    """
    file = find_file(path, PARTS_FILE, **hub)
    if file is None:
        raise ValueError(
            f"{path} names {len(names)} trained tensors but holds no {PARTS_FILE}: the folder is incomplete."
        )
    tensors, state = load_file(file), dict(model.named_parameters())
    check_tensors(file, tensors, {name: state[name].shape if name in state else None for name in names})
    offloaded = [name for name in names if state[name].is_meta]
    if offloaded and hasattr(model, "hf_device_map"):
        raise ValueError(
            f"{path}: `device_map` has offloaded {offloaded[0]}, which then cannot take its trained value. Load a "
            "whole model that `empathic merge` made of this folder, or load without offloading."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def load_adapter(model, path: str, load, **hub) -> None:
    """
    Puts the PEFT adapter of a folder or Hub repository into the model.

    Args:
        load: does it; what PEFT and transformers then only warn of is an error here.

    Raises:
        ValueError: naming the keys that are missing, unexpected, or of another shape, as where the adapter was trained
            on another base.
    """
    file, error = find_file(path, ADAPTER_FILE, **hub), None
    try:
        load()
    except RuntimeError as raised:  # another shape: by now the adapter's layers are there to compare with
        error = raised
    if file is not None and is_peft_available():
        from peft import get_peft_model_state_dict

        ours = get_peft_model_state_dict(model, save_embedding_layers=False)
        with safe_open(file, framework="pt") as saved:
            tensors = {key.removeprefix(ADAPTER_PREFIX): saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118
        check_tensors(file, tensors, {key.removeprefix(ADAPTER_PREFIX): value.shape for key, value in ours.items()})
    if error is not None:
        raise error


def check_head(language_model, text: str) -> None:
    """
    Raises `ValueError` if a causal LM's scores are more than its head's matrix times its last hidden states: what it
    adds, such as a bias, a scale or a cap, would be lost in a model of which it is a part.
    """
    head, seen = language_model.get_output_embeddings(), []
    hook = language_model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    ids = torch.arange(8, device=language_model.device)[None]
    try:
        with torch.no_grad():
            scores = language_model(input_ids=ids).logits
            plain = head(seen[0])
    finally:
        hook.remove()
    if head.bias is not None or not torch.allclose(scores.float(), plain.float(), rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{text}: {type(language_model).__name__} adds a bias to its head's scores, scales or caps them, which "
            "this model would lose. Take a language model whose head is a matrix alone, as Qwen2.5's or Llama's."
        )


class CompositionMixin:
    """`from_parts_pretrained`, and a `from_pretrained` that also loads the output folder of a training stage."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As in transformers; a folder or repository of a training stage loads its base first, then the tensors and the
        adapter that the stage trained.

        Raises:
            ValueError: for a checkpoint that lacks tensors of the model or holds others, of which transformers only
                warns; for a stage of another base; for options that its base of four parts cannot be loaded with.
        """
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_KEYS + REPOSITORY_KEYS if kwargs.get(key) is not None}
        stage = read_stage(path, **hub)
        if stage is None:
            return cls._whole(path, *args, **kwargs)
        # The auto classes name an adapter apart from the path: this folder's own, or one that was trained on it.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        other_adapter = adapter_kwargs.pop("_adapter_model_path", None)
        for key in REPOSITORY_KEYS:
            kwargs.pop(key, None)
        config = kwargs.pop("config", None)  # the base brings its own; the auto classes leave the attention in this one
        if config is not None and "attn_implementation" not in kwargs:
            asked = {key: getattr(config, key)._attn_implementation for key in config.sub_configs}
            asked = {key: value for key, value in {"": config._attn_implementation, **asked}.items() if value}
            if asked:
                kwargs["attn_implementation"] = asked
        info = None
        if isinstance(stage["base"], dict):
            base = {key: resolve_base(path, v) if isinstance(v, str) else v for key, v in stage["base"].items()}
            asked = {key: value for key, value in kwargs.items() if value is not None and not key.startswith("_")}
            options = {
                k: asked.pop(k) for k in ("dtype", "torch_dtype", "attn_implementation", *HUB_KEYS) if k in asked
            }
            other = sorted(asked.keys() - {"output_loading_info", "trust_remote_code", "code_revision"})
            if other:
                raise ValueError(
                    f"{path} starts from four pretrained parts, which are not loaded with {', '.join(other)}. Load a "
                    "whole model that `empathic merge` made of it, or load it plainly and move it with `.to()`."
                )
            model = cls.from_parts_pretrained(**{**base, **options})
            if kwargs.get("output_loading_info"):  # each part raises if it lacks a tensor
                info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        else:
            model = cls.from_pretrained(resolve_base(path, stage["base"]), *args, **kwargs)
            if kwargs.get("output_loading_info"):
                model, info = model
        if stage["trained"]:
            load_parts(model, path, stage["trained"], **hub)
        if find_file(path, ADAPTER_CONFIG, **hub) is not None:
            load_adapter(model, path, partial(model.load_adapter, path, adapter_kwargs=hub), **hub)
        elif not stage["trained"]:
            raise ValueError(
                f"{path} is the folder of the stage {stage['stage']!r}, but it names no trained tensors and holds no "
                f"{ADAPTER_CONFIG}: the folder is incomplete."
            )
        if other_adapter is not None and str(other_adapter) != path:
            load = partial(model.load_adapter, other_adapter, adapter_kwargs=adapter_kwargs)
            load_adapter(model, other_adapter, load, **adapter_kwargs)
        return model if info is None else (model, info)

    @classmethod
    def _whole(cls, path: str, *args, output_loading_info: bool = False, **kwargs):
        """A whole checkpoint. Who asks for the loading info looks at what it lacks; everyone else gets an error."""
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        if any(problems.values()):
            found = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in problems.items() if keys)
            raise ValueError(
                f"{path} does not hold the tensors of this model ({found}). Download or save it again; to load it as "
                "it is, new tensors for those that are missing, pass output_loading_info=True."
            )
        return model

    @classmethod
    def from_parts_pretrained(
        cls,
        text: str,
        vision: str,
        audio: str,
        memory: str,
        dtype: torch.dtype | str = torch.float32,
        attn_implementation: str | None = None,
        video_token: str | None = None,
        audio_token: str | None = None,
        memory_token: str | None = None,
        **kwargs,
    ):
        """
        Composes a model from four pretrained parts; the Q-formers, queries, projectors and the `<MEM>` vector are new.

        Args:
            text, vision, audio, memory: Hub ids or folders of a causal LM, a CLIP model, a Whisper model and a Mamba or
                Mamba-2 model; in the paper Qwen/Qwen2.5-7B-Instruct, openai/clip-vit-base-patch32,
                openai/whisper-tiny, state-spaces/mamba-370m-hf.
            dtype: of all weights.
            attn_implementation: of the parts that support it.
            video_token, audio_token, memory_token: placeholders, see `EmpathicProcessor`.
            kwargs: further arguments of [`EmpathicConfig`], such as `num_query_tokens`; how to fetch files from the
                Hub (`HUB_KEYS`), such as `token`, which is not kept.

        Raises:
            TypeError: for any other argument.
            ValueError: for a language model whose head is more than a matrix.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        dtype = kwargs.pop("torch_dtype", dtype)  # its name in older code
        unknown = sorted(kwargs.keys() - {field.name for field in fields(EmpathicConfig)})
        if unknown:
            raise TypeError(f"from_parts_pretrained() has no argument {', '.join(unknown)}.")
        options = {"dtype": dtype, **hub}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        language_model = AutoModelForCausalLM.from_pretrained(text, **options)
        check_head(language_model, text)
        options["dtype"] = language_model.dtype  # the same for all, also where `dtype` is "auto"
        if AutoConfig.from_pretrained(vision, **hub).model_type == "clip":  # a whole CLIP, with its text tower
            vision_tower = CLIPModel.from_pretrained(vision, **options).vision_model
        else:
            vision_tower = CLIPVisionModel.from_pretrained(vision, **options)
        audio_tower = AutoModel.from_pretrained(audio, **options).get_encoder()
        mamba = AutoModel.from_pretrained(memory, dtype=language_model.dtype, **hub)
        for part in (language_model, vision_tower, audio_tower, mamba):
            if Path(part.config.name_or_path).is_dir():  # a folder of this machine means nothing in a checkpoint
                part.config.name_or_path = ""

        tokenizer, memory_tokenizer = (AutoTokenizer.from_pretrained(name, **hub) for name in (text, memory))
        tokens = find_placeholder_tokens(tokenizer, video=video_token, audio=audio_token, memory=memory_token)
        ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(token) for k, token in tokens.items()}
        if MEM_TOKEN not in memory_tokenizer.get_vocab():
            memory_tokenizer.add_special_tokens({"additional_special_tokens": [MEM_TOKEN]})
        norms = language_model.get_input_embeddings().weight.float().norm(dim=-1)
        config = EmpathicConfig(
            text_config=language_model.config,
            vision_config=vision_tower.config,
            audio_config=audio_tower.config,
            memory_config=mamba.config,
            mem_token_id=memory_tokenizer.convert_tokens_to_ids(MEM_TOKEN),
            embedding_scale=(norms.median() / language_model.config.hidden_size**0.5).item(),
            **{**ids, **kwargs},
        )
        # The pretrained parts take the place of theirs before anything is initialised: only what is new is.
        with init.no_init_weights():
            model = cls._from_config(config, dtype=language_model.dtype, attn_implementation=attn_implementation)
        model.model.language_model, model.lm_head = language_model.base_model, language_model.get_output_embeddings()
        model.model.vision_tower, model.model.audio_tower = vision_tower, audio_tower
        model.model.memory.mamba = use_exact_layers(mamba)
        for part in (language_model, vision_tower, audio_tower, mamba):
            for module in part.modules():
                module._is_hf_initialized = True
        model.initialize_weights()
        model.tie_weights()
        model.generation_config = language_model.generation_config
        model.suppress_placeholders()
        return model.eval()

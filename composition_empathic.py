"""Compose a model from four pretrained parts, or from a training stage's folder and its base."""

import json
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers import initialization as init
from transformers.utils import cached_file, is_peft_available

from .chat_format_empathic import find_chat_format, find_end_of_turn
from .configuration_empathic import (
    HUB_KEYS,
    MEM_TOKEN,
    MEMORY_SIZE,
    EmpathicConfig,
    check_layers,
    find_placeholder_tokens,
)
from .memory_empathic import use_exact_layers

# Files in the output folder of a training stage: `STAGE_FILE` names the stage, its base and the tensors in
# `PARTS_FILE`. If the stage trained a PEFT adapter, the folder holds it too.
STAGE_FILE = "empathic_stage.json"
PARTS_FILE = "trained_parts.safetensors"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # prefix of the keys in a PEFT checkpoint

# The arguments of `from_parts_pretrained` that name a pretrained part, by folder or Hub id.
PART_NAMES = ("text", "vision", "audio", "memory")

# Prefixes of the tensors that come from the four pretrained parts; a composed model initializes all other tensors.
PRETRAINED_PREFIXES = (
    "model.language_model.",
    "lm_head.",
    "model.vision_tower.",
    "model.audio_tower.",
    "model.memory.mamba.",
)

# Arguments of `from_pretrained` that select files within one repository, so they must not reach another repository.
REPOSITORY_KEYS = ("revision", "subfolder")


def find_file(path: str, name: str, **hub) -> str | None:
    """Find a file in a local folder or a Hub repository; None if missing. `hub`: `HUB_KEYS`, `REPOSITORY_KEYS`."""
    return cached_file(
        path, name, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False, **hub
    )


def read_stage(path: str, **hub) -> dict | None:
    """
    Read the stage file: `stage`, `base` (a folder, an id or the four parts), `base_revision` (if the base is not the
    newest of its id), `trained`; None if there is no file.
    """
    file = find_file(str(path), STAGE_FILE, **hub)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def resolve_base(path: str, base: str) -> str:
    """Resolve a stage's base: a path relative to the stage's folder, or else unchanged (an absolute path or an id)."""
    beside = Path(path) / base
    return str(beside.resolve()) if beside.is_dir() else base


def check_tensors(file: str, tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Size | None]) -> None:
    """
    Compare the tensors of a file with the model's shapes under the same keys (None: the model has no such tensor).

    Raises:
        ValueError: if keys are missing, unexpected, or of another shape; the message names them.
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
    Load the tensors of a stage's `trained_parts.safetensors` into the model.

    Raises:
        ValueError: if the file is missing, if keys are missing, unexpected, or of another shape (the message names
            them), or if a tensor's parameter is offloaded.
    """
    file = find_file(path, PARTS_FILE, **hub)
    if file is None:
        raise ValueError(
            f"{path} names {len(names)} trained tensors but has no {PARTS_FILE}: the folder is incomplete. Copy or "
            "download it again."
        )
    tensors, state = load_file(file), dict(model.named_parameters())
    check_tensors(file, tensors, {name: state[name].shape if name in state else None for name in names})
    offloaded = [name for name in names if state[name].is_meta]
    if offloaded and hasattr(model, "hf_device_map"):
        raise ValueError(
            f"{path}: `device_map` offloaded {offloaded[0]}, so its trained value cannot be loaded. Make a whole model "
            "of this folder with `empathic merge` and load that, or load without offloading."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def load_adapter(model, path: str, load, **hub) -> None:
    """
    Load the PEFT adapter of a folder or Hub repository into the model.

    Args:
        load: the function that loads the adapter. PEFT and transformers only warn about keys that do not match; here
            they are an error.

    Raises:
        ValueError: if keys are missing, unexpected, or of another shape, for example because the adapter was trained on
            another base; the message names the keys.
    """
    file, error = find_file(path, ADAPTER_FILE, **hub), None
    try:
        load()
    except RuntimeError as raised:  # another shape: the adapter's layers exist by now, so the keys can be compared
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
    Raise `ValueError` if a causal LM's logits are not just its head's matrix times its last hidden states: a bias, a
    scale or a cap would be lost in the composed model.
    """
    head, ids = language_model.get_output_embeddings(), torch.arange(8, device=language_model.device)[None]
    with torch.no_grad():
        scores, plain = language_model(input_ids=ids).logits, head(language_model.base_model(input_ids=ids)[0])
    if head.bias is not None or not torch.allclose(scores.float(), plain.float(), rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{text}: {type(language_model).__name__} adds a bias to its logits, scales or caps them, which the "
            "composed model does not support. Use a language model whose head is only a matrix, such as Qwen2.5 or "
            "Llama."
        )


def embedding_scale(language_model) -> float:
    """
    Measure the root mean square of the vectors that the language model's embedding module gives, which may scale its
    weights (as Gemma 3's does): the median over the vocabulary.
    """
    embeddings = language_model.get_input_embeddings()
    ids = torch.arange(embeddings.num_embeddings, device=embeddings.weight.device)
    with torch.no_grad():
        width = embeddings(ids[:1]).shape[-1]
        norms = torch.cat([embeddings(part).float().norm(dim=-1) for part in ids.split(8192)])
    return (norms.median() / width**0.5).item()


def end_generation_at(generation_config, token_id: int) -> None:
    """Add a token to those that end a reply, if it is not among them."""
    ends = generation_config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if token_id not in ends:
        generation_config.eos_token_id = [*ends, token_id]


class CompositionMixin:
    """`from_parts_pretrained`, and a `from_pretrained` that also loads the output folder of a training stage."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """
        As in transformers. For the folder or repository of a training stage, load its base first, then the tensors and
        the adapter that the stage trained.

        Raises:
            ValueError: for a checkpoint with missing or unexpected tensors (transformers only warns about them); for a
                stage that does not fit its base; for options that are not supported with a base of four parts.
        """
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_KEYS + REPOSITORY_KEYS if kwargs.get(key) is not None}
        stage = read_stage(path, **hub)
        if stage is None:
            return cls._whole(path, *args, **kwargs)
        # The auto classes pass an adapter separately: this folder's own adapter, or one that was trained on the folder.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        other_adapter = adapter_kwargs.pop("_adapter_model_path", None)
        for key in REPOSITORY_KEYS:
            kwargs.pop(key, None)
        config = kwargs.pop("config", None)  # the base has its own; the auto classes put attn_implementation into it
        if config is not None and "attn_implementation" not in kwargs:
            asked = {key: getattr(config, key)._attn_implementation for key in config.sub_configs}
            asked = {key: value for key, value in {"": config._attn_implementation, **asked}.items() if value}
            if asked:
                kwargs["attn_implementation"] = asked
        info = None
        if isinstance(stage["base"], dict):
            base = stage["base"] | {name: resolve_base(path, stage["base"][name]) for name in PART_NAMES}
            asked = {key: value for key, value in kwargs.items() if value is not None and not key.startswith("_")}
            options = {
                k: asked.pop(k) for k in ("dtype", "torch_dtype", "attn_implementation", *HUB_KEYS) if k in asked
            }
            other = sorted(asked.keys() - {"output_loading_info", "trust_remote_code", "code_revision"})
            if other:
                raise ValueError(
                    f"{path} starts from four pretrained parts, which cannot be loaded with {', '.join(other)}. Make a "
                    "whole model of it with `empathic merge` and load that, or load it without these options and move "
                    "it with `.to()`."
                )
            model = cls.from_parts_pretrained(**{**base, **options})
            if kwargs.get("output_loading_info"):  # each part raises if it lacks a tensor
                info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        else:
            if stage.get("base_revision") is not None:
                kwargs["revision"] = stage["base_revision"]
            model = cls.from_pretrained(resolve_base(path, stage["base"]), *args, **kwargs)
            if kwargs.get("output_loading_info"):
                model, info = model
        own = find_file(path, "config.json", **hub)
        if own is not None:  # a stage that trains the memory may change its size
            own = json.loads(Path(own).read_text(encoding="utf-8"))
            vars(model.config).update({name: own[name] for name in MEMORY_SIZE if name in own})
        if stage["trained"]:
            load_parts(model, path, stage["trained"], **hub)
        if find_file(path, ADAPTER_CONFIG, **hub) is not None:
            load_adapter(model, path, partial(model.load_adapter, path, adapter_kwargs=hub), **hub)
        elif not stage["trained"]:
            raise ValueError(
                f"{path} is the folder of the stage {stage['stage']!r}, but it names no trained tensors and has no "
                f"{ADAPTER_CONFIG}: the folder is incomplete. Copy or download it again."
            )
        if other_adapter is not None and str(other_adapter) != path:
            load = partial(model.load_adapter, other_adapter, adapter_kwargs=adapter_kwargs)
            load_adapter(model, other_adapter, load, **adapter_kwargs)
        return model if info is None else (model, info)

    @classmethod
    def _whole(cls, path: str, *args, output_loading_info: bool = False, **kwargs) -> Any:
        """Load a whole checkpoint. Missing or unexpected tensors are an error unless `output_loading_info` is set."""
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if output_loading_info:
            return model, info
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        if any(problems.values()):
            found = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, keys in problems.items() if keys)
            raise ValueError(
                f"{path} does not hold the tensors of this model ({found}). Download or save it again. To load it "
                "anyway, with newly initialized values for missing tensors, pass output_loading_info=True."
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
        chat_template: str | None = None,
        **kwargs,
    ):
        """
        Compose a model from four pretrained parts. The Q-formers, queries, projectors and the `<MEM>` embedding are
        newly initialized.

        Args:
            text, vision, audio, memory: Hub ids or folders of a causal LM, a CLIP model, a Whisper model and a Mamba or
                Mamba-2 model. The paper uses Qwen/Qwen2.5-7B-Instruct, openai/clip-vit-base-patch32,
                openai/whisper-tiny and state-spaces/mamba-370m-hf.
            dtype: the dtype of all weights.
            attn_implementation: the attention implementation of the parts that support it.
            video_token, audio_token, memory_token: placeholder tokens, see `EmpathicProcessor`.
            chat_template: the language model's chat template, see `EmpathicProcessor.from_parts_pretrained`.
            kwargs: further arguments of [`EmpathicConfig`], such as `num_query_tokens`, and options for the download
                from the Hub (`HUB_KEYS`), such as `token`, which are not saved.

        Raises:
            TypeError: for any other argument.
            ValueError: for a language model whose head is not just a matrix, or whose tokenizer has no placeholder
                tokens or no chat format; for layers that the Whisper model does not have.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        dtype = kwargs.pop("torch_dtype", dtype)  # its name in older code
        unknown = sorted(kwargs.keys() - {field.name for field in fields(EmpathicConfig)})
        if unknown:
            raise TypeError(f"from_parts_pretrained() got unexpected arguments: {', '.join(unknown)}.")
        if (layers := kwargs.get("audio_feature_layers")) is not None:  # before the large parts are loaded
            check_layers(layers, AutoConfig.from_pretrained(audio, **hub).encoder_layers)
        options = {"dtype": dtype, **hub}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        language_model = AutoModelForCausalLM.from_pretrained(text, **options)
        check_head(language_model, text)
        options["dtype"] = language_model.dtype  # all parts get the same dtype, even if `dtype` is "auto"
        if AutoConfig.from_pretrained(vision, **hub).model_type == "clip":  # a whole CLIP, with its text tower
            vision_tower = CLIPModel.from_pretrained(vision, **options).vision_model
        else:
            vision_tower = CLIPVisionModel.from_pretrained(vision, **options)
        audio_tower = AutoModel.from_pretrained(audio, **options).get_encoder()
        mamba = AutoModel.from_pretrained(memory, dtype=language_model.dtype, **hub)
        for part in (language_model, vision_tower, audio_tower, mamba):
            if Path(part.config.name_or_path).is_dir():  # a local path is useless in a checkpoint
                part.config.name_or_path = ""

        tokenizer, memory_tokenizer = (AutoTokenizer.from_pretrained(name, **hub) for name in (text, memory))
        tokens = find_placeholder_tokens(tokenizer, video=video_token, audio=audio_token, memory=memory_token)
        end_of_turn_id = tokenizer.convert_tokens_to_ids(
            find_end_of_turn(tokenizer, find_chat_format(tokenizer, chat_template))
        )
        ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(token) for k, token in tokens.items()}
        if MEM_TOKEN not in memory_tokenizer.get_vocab():
            memory_tokenizer.add_special_tokens({"additional_special_tokens": [MEM_TOKEN]})
        scale = embedding_scale(language_model)
        config = EmpathicConfig(
            text_config=language_model.config,
            vision_config=vision_tower.config,
            audio_config=audio_tower.config,
            memory_config=mamba.config,
            mem_token_id=memory_tokenizer.convert_tokens_to_ids(MEM_TOKEN),
            embedding_scale=scale,
            **{**ids, **kwargs},
        )
        # The pretrained parts replace the empty parts first, so that only the new parameters are initialized.
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
        end_generation_at(model.generation_config, end_of_turn_id)
        model.suppress_placeholders()
        return model.eval()

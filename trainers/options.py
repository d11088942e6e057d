"""Options of training: how they are read, and which options of transformers' and TRL's classes have an effect here."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import transformers
from trl import ModelConfig, TrlParser

from ..files import clean_path, packaged
from .compat import TrainingArguments

# Every option of `TrainingArguments` that a trainer uses, or that asks for what it does anyway. An option that is
# neither here nor in a table of options without an effect comes from a newer transformers: nobody has checked it.
USED_OPTIONS = frozenset(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 bf16_full_eval
    fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
    auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed use_cpu accelerator_config dataloader_drop_last
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order remove_unused_columns ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug
    skip_memory_metrics do_train resume_from_checkpoint local_rank average_tokens_across_devices label_names use_cache
    neftune_noise_alpha data_seed train_sampling_strategy use_liger_kernel liger_kernel_config
    """.split()
)
# Options without an effect, by their names, each with the reason.
_NO_PREDICTIONS = "evaluation computes the loss and keeps no predictions"
UNUSED_EVERYWHERE = {
    "do_eval": "eval_strategy decides when to evaluate",
    "do_predict": "training computes no predictions: use `empathic evaluate`",
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "length_column_name": "rows are not grouped by their length",
    "parallelism_config": "the trainers do not support tensor or context parallelism",
}
UNUSED_IN_PACKED = {
    **UNUSED_EVERYWHERE,
    "label_names": "the batches have fixed names",
    "use_cache": "no batch is computed with a key-value cache",
    "neftune_noise_alpha": "rows are packed into one, which would change the noise",
}
_STREAM = "the stream of samples is shuffled by seed alone"
UNUSED_IN_STREAMS = {"data_seed": _STREAM, "train_sampling_strategy": _STREAM}
UNUSED_IN_EPO = {
    **UNUSED_IN_PACKED,
    "average_tokens_across_devices": "the loss is always a mean over all processes",
}
_LIGER = "its kernels do not know this model"
UNUSED_IN_STAGES = {
    **UNUSED_IN_PACKED,
    **UNUSED_IN_STREAMS,
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
}
UNUSED_IN_BASELINES = {**UNUSED_EVERYWHERE, **UNUSED_IN_STREAMS}

# Options of TRL's `ModelConfig`, and the option that each of the others needs.
MODEL_OPTIONS = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")
LORA_OPTIONS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
    *("use_rslora", "use_dora"),
)
QUANTIZATION_OPTIONS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")

# Values that are paths: `~` and quotes are understood in them.
PATH_OPTIONS = frozenset(
    """
    model_name_or_path dataset_name output_dir feature_cache text vision audio memory resume_from_checkpoint deepspeed
    fsdp_config
    """.split()
)


def changed_options(options) -> dict:
    """Return the options of a dataclass instance whose values differ from the defaults of its class."""
    changed = {}
    for field in dataclasses.fields(options):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default is not dataclasses.MISSING and getattr(options, field.name) != default:
            changed[field.name] = getattr(options, field.name)
    return changed


def _refuse(name: str, value, reason: str) -> None:
    raise ValueError(f"{name} is {value!r}, but has no effect: {reason}. Leave {name} out.")


def check_training_options(args: TrainingArguments, unused: dict[str, str]) -> None:
    """
    Check options of transformers that are not at their defaults. Call it before transformers' `__post_init__`, which
    changes values.

    Args:
        args: an instance of a subclass of `TrainingArguments`.
        unused: the options without an effect in this trainer, each with the reason.

    Raises:
        ValueError: for an option without an effect, or one that this code does not know; the message names it.
    """
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name, value in changed_options(args).items():
        if name not in inherited or (name == "do_eval" and args.eval_strategy != "no"):
            continue
        if name == "train_sampling_strategy" and value == "sequential":
            continue  # what a stream of samples does anyway, and what a copy of these arguments has
        if name in unused:
            _refuse(name, value, unused[name])
        if name == "liger_kernel_config" and not args.use_liger_kernel:
            _refuse(name, value, "it needs use_liger_kernel")
        if name not in USED_OPTIONS:
            _refuse(name, value, f"transformers {transformers.__version__} has this option, but these trainers do not")


def check_model_options(model_args: ModelConfig, quantizes: bool = True) -> None:
    """
    Check options of TRL's `ModelConfig` that are not at their defaults.

    Args:
        quantizes: whether the model can be quantized.

    Raises:
        ValueError: for an option without an effect, or one that this code does not know; the message names it.
    """
    for name, value in changed_options(model_args).items():
        if name in ("load_in_4bit", "load_in_8bit") and not quantizes:
            _refuse(name, value, "the model is not quantized")
        if name in QUANTIZATION_OPTIONS and not model_args.load_in_4bit:
            _refuse(name, value, "it needs load_in_4bit")
        if name == "lora_task_type":
            _refuse(name, value, "the adapter is always one of a causal language model, CAUSAL_LM")
        if name not in ("use_peft", *MODEL_OPTIONS, *LORA_OPTIONS, *QUANTIZATION_OPTIONS):
            _refuse(name, value, "TRL's ModelConfig has this option, but the model is loaded without it")
    name, revision = model_args.model_name_or_path, revision_of(model_args)
    if revision is not None and (name is None or Path(name).is_dir()):
        where = "a model composed of four parts" if name is None else f"the folder {name}"
        _refuse("model_revision", revision, f"{where} has no revisions")


def check_unset(options, names: Sequence[str], reason: str) -> None:
    """Raise a ValueError if one of these options is not at its default; `reason` is why it would have no effect."""
    for name, value in changed_options(options).items():
        if name in names:
            _refuse(name, value, reason)


def revision_of(model_args: ModelConfig) -> str | None:
    """Return the revision of the model on the Hub, or None for its newest."""
    revision = model_args.model_revision
    return None if revision in (None, "main") else revision


# ------------------------------------------------------------------------------------------------------- reading YAML


class OptionParser(TrlParser):
    """TRL's parser, with YAML values checked against the types of the options, and `~` understood in paths."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.dest in PATH_OPTIONS:
                action.type = clean_path  # also converts a string from the YAML file

    def parse_args_and_config(self, args: Sequence[str], **kwargs):
        """As in TRL. The file after `--config` may also be one of this package, such as `recipes/tiny/epo.yaml`."""
        places = [place + 1 for place, word in enumerate(args[:-1]) if word == "--config"]
        args = [packaged(word) if place in places else word for place, word in enumerate(args)]
        return super().parse_args_and_config(args=args, **kwargs)

    def set_defaults_with_config(self, **config) -> list[str]:
        """As in TRL. Raises a ValueError that names the option if a value is not of its type."""
        hints = {}
        for kind in self.dataclass_types:
            known = typing.get_type_hints(kind)
            hints |= {field.name: known[field.name] for field in dataclasses.fields(kind)}
        for name, value in config.items():
            if name in hints:
                config[name] = value = yaml_value(name, value, hints[name])
            if name in PATH_OPTIONS and isinstance(value, list):
                config[name] = [clean_path(item) if isinstance(item, str) else item for item in value]
        return super().set_defaults_with_config(**config)


def _members(hint) -> list:
    """The members of a union type, or the type itself."""
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def yaml_value(name: str, value, hint):
    """
    Return a value of a YAML file as a value of the option's type. A string that is none of the type stays, because
    the parser of the command line converts strings.

    Raises:
        ValueError: if the value cannot be meant; the message names the option.
    """
    kinds = _members(hint)
    lists = [kind for kind in kinds if typing.get_origin(kind) is list or kind is list]
    if value is None:
        if type(None) in kinds:
            return None
        raise ValueError(f"{name} is empty in the YAML file. Give a value, or leave the line out.")
    if isinstance(value, list) and lists:
        items = typing.get_args(lists[0])
        return [_yaml_item(name, item, items[0]) for item in value] if items else value
    if lists and not [kind for kind in kinds if kind not in (*lists, type(None))]:
        return _yaml_item(name, value, (typing.get_args(lists[0]) or (str,))[0])  # a single item in place of a list
    if isinstance(value, bool):
        if bool in kinds:
            return value
        if not value and (name.endswith("_strategy") or name == "report_to"):
            return "none" if name == "report_to" else "no"
        words = "no, off or false" if not value else "yes, on or true"
        remedy = f'Write it in quotes, `{name}: "no"`' if str in kinds and not value else f"Give {_expected(kinds)}"
        raise ValueError(f"{name} is {value}, which is how YAML reads {words} without quotes. {remedy}.")
    if isinstance(value, float) and float not in kinds and int in kinds:
        if value.is_integer():
            return int(value)
        raise ValueError(f"{name} is {value!r}. Give {_expected(kinds)}.")
    if isinstance(value, int) and bool in kinds and int not in kinds and float not in kinds:
        if value in (0, 1):
            return bool(value)
        raise ValueError(f"{name} is {value!r}. Give true or false.")
    if isinstance(value, (int, float)) and not {int, float} & set(kinds):
        raise ValueError(f'{name} is the number {value!r}. Give {_expected(kinds)}, in quotes: `{name}: "{value}"`.')
    if isinstance(value, (list, dict)) and not (dict in kinds or lists or (str in kinds and len(kinds) > 2)):
        raise ValueError(f"{name} is {value!r}. Give {_expected(kinds)}.")
    return value


def _yaml_item(name: str, value, hint):
    if isinstance(value, str) and hint in (int, float):  # the parser of the command line converts no lists
        try:
            return hint(value)
        except ValueError:
            raise ValueError(f"{name} has the item {value!r}. Give {_expected([hint])}.") from None
    return yaml_value(name, value, hint)


def _expected(kinds: list) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    found = [words[kind] for kind in words if kind in kinds]
    return " or ".join(found) or "another value"

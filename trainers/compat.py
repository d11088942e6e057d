"""Compatibility with the versions of transformers that training supports, 5.20 to 5.24."""

from dataclasses import dataclass, field
from inspect import signature

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..processing_empathic import control_pattern


class _WithoutTokens:
    """
    Arguments that are pickled without their tokens: every trainer writes its arguments to `training_args.bin`, in each
    checkpoint. A loaded copy uses HF_TOKEN or the token of `hf auth login`.
    """

    def __getstate__(self) -> dict:
        return {name: None if name.endswith("_token") else value for name, value in vars(self).items()}


if "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__:

    @dataclass
    class TrainingArguments(_WithoutTokens, transformers.TrainingArguments):
        """The training arguments of transformers, which are pickled without their tokens."""

else:

    @dataclass
    class TrainingArguments(_WithoutTokens, transformers.TrainingArguments):
        """The training arguments of transformers before 5.23, with the names that 5.23 introduced."""

        activation_checkpointing: bool | None = field(
            default=None, metadata={"help": "Compute activations again in the backward pass, to save memory."}
        )
        activation_checkpointing_kwargs: dict | str | None = field(
            default=None, metadata={"help": "Arguments of the model's `gradient_checkpointing_enable()`."}
        )

        def __post_init__(self):
            if self.activation_checkpointing is not None:
                self.gradient_checkpointing = self.activation_checkpointing
            if self.activation_checkpointing_kwargs is not None:
                self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
            super().__post_init__()
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


def enable_activation_checkpointing(model: PreTrainedModel, kwargs: dict | None = None) -> None:
    """Enable activation checkpointing by the method that the installed transformers has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(kwargs)


def sanitized(
    templated: PreTrainedTokenizerBase | ProcessorMixin, chats: list[list[dict]]
) -> tuple[list[list[dict]], dict]:
    """
    Prepare untrusted chats for `templated.apply_chat_template`, so that their texts cannot write control tokens.

    Returns:
        The chats, and further arguments of the call. From 5.23 on, `sanitize_control_tokens` does this. For earlier
        versions, the chats are copies in which a zero-width space breaks up each control token.
    """
    if "sanitize_control_tokens" in signature(templated.apply_chat_template).parameters:
        return chats, {"sanitize_control_tokens": True}
    tokenizer = templated.tokenizer if isinstance(templated, ProcessorMixin) else templated
    pattern = control_pattern(tokenizer)

    def plain(text: str) -> str:
        return pattern.sub(lambda match: match[0][:1] + "\u200b" + match[0][1:], text)

    def copied(message: dict) -> dict:
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": plain(content)}
        items = [{**item, "text": plain(item["text"])} if item["type"] == "text" else item for item in content]
        return {**message, "content": items}

    return [[copied(message) for message in chat] for chat in chats], {}

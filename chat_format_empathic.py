"""How a conversation is written for a language model: ChatML, or the model's own chat template."""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# For chat templates that reject a system message, or turns that do not alternate: the system message becomes a user
# message, and neighbors of the same role become one message.
ALTERNATE = """\
{%- set merged = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set role = 'user' if message.role == 'system' else message.role -%}
{%- if merged.messages and merged.messages[-1].role == role -%}
{%- set content = merged.messages[-1].content ~ '\\n\\n' ~ message.content -%}
{%- set merged.messages = merged.messages[:-1] + [{'role': role, 'content': content}] -%}
{%- else -%}
{%- set merged.messages = merged.messages + [{'role': role, 'content': message.content}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = merged.messages -%}
"""

# The conversations that a chat format must be able to write: history as text may begin with either role.
_PROBES = (
    [("system", "alpha"), ("user", "beta")],
    [("system", "alpha"), ("assistant", "beta"), ("user", "gamma"), ("user", "delta")],
)


def control_tokens(tokenizer) -> set[str]:
    """Return the spellings of a tokenizer's control tokens. GPT-NeoX's added runs of spaces are none."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return {token for token in tokens if token.strip()}


def template_variables(tokenizer) -> dict[str, Any]:
    """Return the variables that a language model's chat template expects, such as `bos_token`."""
    return {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}


def _render(template: str, turns: list[tuple[str, str]], tokenizer, add_generation_prompt: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered, _ = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **template_variables(tokenizer),
        enable_thinking=False,  # for the templates of reasoning models
    )
    return rendered[0]


def _writes_all(template: str, tokenizer) -> bool:
    """Whether the template writes every message of each probe, in order."""
    for turns in _PROBES:
        try:
            text = _render(template, turns, tokenizer, add_generation_prompt=True)
        except TemplateError:
            return False
        places = [text.find(content) for _, content in turns]
        if -1 in places or places != sorted(places):
            return False
    return True


def find_chat_format(tokenizer, chat_template: str | None = None) -> str:
    """
    Find the Jinja template that writes `messages` of the roles system, user and assistant for a language model.

    Args:
        tokenizer: the language model's tokenizer.
        chat_template: a chat template to use instead of the tokenizer's.

    Returns:
        `chat_template`; else ChatML if its tokens are in the vocabulary; else the tokenizer's own chat template. If the
        template needs it, after `ALTERNATE`.

    Raises:
        ValueError: if the tokenizer knows no chat format, or the template leaves out a part of a conversation.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    vocabulary = tokenizer.get_vocab()
    if chat_template is None:
        chat_template = CHATML if all(token in vocabulary for token in CHATML_TOKENS) else own
    if chat_template is None:
        raise ValueError(
            f"The text tokenizer {tokenizer.name_or_path!r} has no chat template, and its vocabulary lacks ChatML's "
            f"tokens {' and '.join(CHATML_TOKENS)}. Use an instruction-tuned model, or give a Jinja chat template with "
            "`chat_template=`."
        )
    for template in (chat_template, ALTERNATE + chat_template):
        if _writes_all(template, tokenizer):
            return template
    raise ValueError(
        f"The chat template of the text tokenizer {tokenizer.name_or_path!r} cannot be rendered, or leaves out a part "
        "of a conversation. Give another Jinja chat template with `chat_template=`."
    )


def find_end_of_turn(tokenizer, chat_format: str) -> str:
    """Return the special token that ends a reply in a chat format; the tokenizer's EOS token if there is none."""
    turns = [("system", "alpha"), ("user", "beta"), ("assistant", "gamma")]
    after = _render(chat_format, turns, tokenizer, add_generation_prompt=False).rpartition("gamma")[2].lstrip()
    found = [token for token in control_tokens(tokenizer) if after.startswith(token)]
    return max(found, key=len) if found else tokenizer.eos_token

"""The files of a Hub Space that serves the page."""

from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from .uploads import Limits

PACKAGE = Path(__file__).parents[1]
# Files of this package that the page needs; they are copied into the Space, which does not install the package.
SOURCES = (
    "chat.py",
    "clip_limits.py",
    "emotions.py",
    "hosts.py",
    "sampling.py",
    "thoughts.py",
    "*_empathic.py",
    "chat_templates/*",
    "demo/*",
)
NOT_NEEDED = ("space.py",)

APP = '''"""The page of the Space, written by `empathic push-space`."""

from empathic.demo.zero_gpu import chatbot_class  # first, because ZeroGPU's package must be imported before torch

from empathic.demo.app import Page
from empathic.demo.session import NamedModel
from empathic.demo.uploads import Limits

MODEL = {model!r}
COMPARE = {compare!r}

chatbot = chatbot_class()(
    NamedModel.from_pretrained(MODEL),
    None if COMPARE is None else NamedModel.from_pretrained(COMPARE),
    max_new_tokens={max_new_tokens},
)
page = Page(chatbot, Limits(megabytes={megabytes:g}, seconds={seconds:g}), concurrency={concurrency})

if __name__ == "__main__":
    page.launch()
'''

README = """---
title: {title}
emoji: 💬
colorFrom: yellow
colorTo: red
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
license: apache-2.0
models:
{models}
tags:
- empathic
- audio-visual
- dialogue
short_description: Talk to a chatbot with your face and voice
---

# Talk to {model} with your face and voice

The model takes your text, your voice and your face, shows the emotion that it recognizes, and replies to it. Each
earlier utterance takes only one memory vector in the prompt.

Clips are limited in size ({megabytes:g} MB) and length ({seconds:g} s), decoded in a separate process, and deleted
right after. A conversation is kept during the visit and half an hour longer, separate from other visitors'
conversations.

It runs on a CPU, a GPU or ZeroGPU: choose the hardware in the Space's settings.

If a model of this Space is private, add a token with read access as the secret `HF_TOKEN` in the Space's settings.

## Use from a program

```python
from gradio_client import Client, handle_file

client = Client("{space}")  # token="hf_..." for a private Space
first = client.predict("i have a horse called tiger.", None, None, None, api_name="/reply")
clip = handle_file("clip.mp4")
second = client.predict("do you remember my horse?", None, clip, first["conversation"], api_name="/reply")
print(second["reply"], second["emotions"], second["memory_vectors"])
print(client.predict("", handle_file("voice.wav"), None, api_name="/emotion"))
```
"""


def space_files(
    space: str,
    model: str,
    compare: str | None = None,
    limits: Limits | None = None,
    concurrency: int = 1,
    max_new_tokens: int = 128,
) -> dict[str, bytes]:
    """
    Return all files of a Space: path in the Space -> content.

    Args:
        space, model, compare: Hub ids of the Space, of the model and of a second model to compare with.
        limits, concurrency, max_new_tokens: options of the page.
    """
    limits = limits or Limits()
    names = {"model": model, "compare": compare, "concurrency": concurrency, "max_new_tokens": max_new_tokens}
    values = {**names, "megabytes": limits.megabytes, "seconds": limits.seconds}
    models = "\n".join(f"- {name}" for name in (model, compare) if name is not None)
    title = space.split("/")[-1].replace("-", " ").replace("_", " ")
    texts = {
        "app.py": APP.format(**values),
        "README.md": README.format(**values, title=title, space=space, models=models, gradio=version("gradio")),
        "requirements.txt": "".join(f"{line}\n" for line in requirements()),
        "empathic/__init__.py": "",
    }
    files = {name: text.encode() for name, text in texts.items()}
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)):
            if path.is_file() and path.suffix in (".py", ".jinja", ".css", ".js") and path.name not in NOT_NEEDED:
                files[f"empathic/{path.relative_to(PACKAGE).as_posix()}"] = path.read_bytes()
    return files


def requirements() -> list[str]:
    """The page's requirements except Gradio, which is in the Space's metadata; models with adapters need peft."""
    found = [Requirement(line) for line in requires("empathic") or []]
    own = [line for line in found if line.marker is None]
    adapters = [line for line in found if line.name == "peft" and line.marker is not None]
    return sorted({f"{line.name}{line.specifier}" for line in (*own, *adapters)})

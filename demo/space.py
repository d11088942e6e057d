"""The files of a Space of the Hub that shows the page."""

from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement

from empathic.demo.uploads import Limits

PACKAGE = Path(__file__).parents[1]
# What the page needs of this package; it travels with the Space, which need not find it elsewhere.
SOURCES = ("chat.py", "*_empathic.py", "chat_templates/*", "demo/*")
NOT_NEEDED = ("space.py",)

APP = '''"""The page of the Space; made by `empathic push-space`."""

from empathic.demo.app import Page
from empathic.demo.session import Chatbot, Checkpoint
from empathic.demo.uploads import Limits

MODEL = {model!r}
COMPARE = {compare!r}

chatbot = Chatbot(
    Checkpoint.from_pretrained(MODEL),
    None if COMPARE is None else Checkpoint.from_pretrained(COMPARE),
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
python_version: "3.11"
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

The model reads what you write, your voice and your face, names the emotion that it recognises, and replies to it. What
was said before costs it one memory vector an utterance.

Clips are read in a process of their own, bounded in size ({megabytes:g} MB) and length ({seconds:g} s), and deleted
right after. Conversations are kept for the visit and half an hour, each visitor's apart from the others'.

If a model of this Space is private, add a token that may read it as the secret `HF_TOKEN` in the Space's settings.

## From a program

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
    All files of a Space, by their path in it.

    Args:
        space, model, compare: ids on the Hub: of the Space, of the model and of a second one to compare with.
        limits, concurrency, max_new_tokens: of the page.
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
    """What the page needs beside Gradio, which the Space's metadata names; peft is for models with adapters."""
    found = [Requirement(line) for line in requires("empathic") or []]
    own = [line for line in found if line.marker is None]
    adapters = [line for line in found if line.name == "peft" and line.marker is not None]
    return sorted({f"{line.name}{line.specifier}" for line in (*own, *adapters)})

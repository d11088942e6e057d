"""The files of a Hub Space that serves the page."""

from collections.abc import Sequence
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

from .app import PageOptions
from .examples import example_files

PACKAGE = Path(__file__).parents[1]
# Files of this package that the page needs; they are copied into the Space, which does not install the package.
SOURCES = (
    "chat.py",
    "clip_limits.py",
    "decoding.py",
    "emotions.py",
    "errors.py",
    "hosts.py",
    "sampling.py",
    "thoughts.py",
    "*_empathic.py",
    "chat_templates/*",
    "demo/*",
    "demo/static/*",
    "serve/*",
)
NOT_NEEDED = ("demo/space.py", "serve/handler.py", "serve/vllm_backend.py")
ZERO_GPU = "demo/zero_gpu.py"  # needed only there
EXAMPLES = "examples"
# Needed in addition to the package's own requirements; models with adapters need peft.
FURTHER = ("fastapi", "peft", "prometheus-client", "uvicorn")

APP = '''"""The page of the Space, written by `empathic push-space`."""

{imports}

if __name__ == "__main__":
    options = PageOptions(
        megabytes={megabytes:g},
        seconds={seconds:g},
        concurrency={concurrency},
        max_new_tokens={max_new_tokens},
        compare_name={compare_name!r},
        examples={examples},
    )
    {serve}({model!r}, {compare!r}, options, host="0.0.0.0", port={port})
'''
IMPORTS = """from empathic.demo.app import PageOptions, serve_page
from empathic.demo.examples import read_examples"""
ZERO_GPU_IMPORTS = """import spaces  # before torch, whose functions it replaces

from empathic.demo.app import PageOptions
from empathic.demo.examples import read_examples
from empathic.demo.zero_gpu import serve_on_zero_gpu"""
PORT = 7860

DOCKERFILE = """FROM python:3.11-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user -r requirements.txt
COPY --chown=user . .
EXPOSE 7860
CMD ["python", "app.py"]
"""

SDK = f"""sdk: docker
app_port: {PORT}"""
# ZeroGPU runs only with this SDK, and with few versions of Python.
ZERO_GPU_SDK = """sdk: gradio
sdk_version: 6.31.0
python_version: 3.12.12
fullWidth: true
app_file: app.py
suggested_hardware: zero-a10g"""
ZERO_GPU_REQUIREMENTS = ("gradio>=6.31,<7", "spaces>=0.51")

README = """---
title: {title}
emoji: 💬
colorFrom: yellow
colorTo: red
{sdk}
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

Clips are limited in size ({megabytes:g} MB) and length ({seconds:g} s), decoded in a separate process, never stored.
The conversation is in your browser; what the server has computed of it leaves {kept}.

If a model of this Space is private, add a token with read access as the secret `HF_TOKEN` in the Space's settings.

## Use from a program

The Space speaks OpenAI's chat completions protocol. A private Space also needs a token in the header `Authorization`.

```python
import base64
from pathlib import Path

from openai import OpenAI

client = OpenAI(base_url="https://{host}.hf.space/v1", api_key="none")  # or your token
clip = base64.b64encode(Path("clip.mp4").read_bytes()).decode()
content = [
    {{"type": "video_url", "video_url": {{"url": f"data:video/mp4;base64,{{clip}}"}}}},
    {{"type": "text", "text": "do you remember my horse?"}},
]
messages = [
    {{"role": "user", "content": "i have a horse called tiger."}},
    {{"role": "assistant", "content": "how is tiger the horse?"}},
    {{"role": "user", "content": content}},
]
answer = client.chat.completions.create(model="{name}", messages=messages)
print(answer.choices[0].message.content, answer.choices[0].message.emotion)
```
"""


def space_files(
    space: str,
    model: str,
    compare: str | None = None,
    options: PageOptions | None = None,
    zero_gpu: bool = False,
) -> dict[str, bytes]:
    """
    Return all files of a Space: path in the Space -> content.

    Args:
        space, model, compare: Hub ids of the Space, of the model and of a second model to compare with.
        options: options of the page.
        zero_gpu: whether the Space is for ZeroGPU instead of Docker.
    """
    options = options or PageOptions()
    values = {
        "model": model,
        "compare": compare,
        "name": model.split("/")[-1],
        "title": space.split("/")[-1].replace("-", " ").replace("_", " "),
        "host": space.replace("/", "-").replace("_", "-").replace(".", "-").lower(),
        "models": "\n".join(f"- {name}" for name in (model, compare) if name is not None),
        "examples": f"read_examples({EXAMPLES!r})" if options.examples else "[]",
        "port": PORT,
        "imports": ZERO_GPU_IMPORTS if zero_gpu else IMPORTS,
        "serve": "serve_on_zero_gpu" if zero_gpu else "serve_page",
        "sdk": ZERO_GPU_SDK if zero_gpu else SDK,
        "kept": "after each reply" if zero_gpu else f"{options.keep_seconds / 60:g} minutes after your last turn",
        **{name: getattr(options, name) for name in ("megabytes", "seconds", "concurrency", "max_new_tokens")},
        "compare_name": options.compare_name,
    }
    texts = {
        "app.py": APP.format(**values),
        "README.md": README.format(**values),
        "requirements.txt": "".join(f"{line}\n" for line in requirements(ZERO_GPU_REQUIREMENTS if zero_gpu else ())),
        "empathic/__init__.py": "",
    }
    if not zero_gpu:
        texts["Dockerfile"] = DOCKERFILE
    not_needed = NOT_NEEDED if zero_gpu else (*NOT_NEEDED, ZERO_GPU)
    files = {name: text.encode() for name, text in texts.items()}
    for pattern in SOURCES:
        for path in sorted(PACKAGE.glob(pattern)):
            name = path.relative_to(PACKAGE).as_posix()
            if path.suffix in (".py", ".jinja", ".html", ".css", ".js") and name not in not_needed:
                files[f"empathic/{name}"] = path.read_bytes()
    if options.examples:
        examples = example_files(list(options.examples))
        files |= {f"{EXAMPLES}/{name}": content for name, content in examples.items()}
    return files


def requirements(more: Sequence[str] = ()) -> list[str]:
    """Return the requirements of the page, with the versions that this package needs, and `more` of them."""
    found = [Requirement(line) for line in requires("empathic") or []]
    needed = [line for line in found if line.marker is None or line.name in FURTHER]
    return sorted({*(f"{line.name}{line.specifier}" for line in needed), *more})

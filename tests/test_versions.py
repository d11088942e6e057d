"""
Checkpoints under every supported minor version of transformers, in processes without this package.

`make test-versions` installs the versions side by side and runs this file; `CHECKPOINT=FOLDER` replaces the tiny
checkpoint with another checkpoint, such as quickstart's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoTokenizer, Mamba2Config, Mamba2ForCausalLM

from empathic.compat_empathic import NEWEST_TESTED, OLDEST_TESTED
from empathic.modeling_empathic import EmpathicForConditionalGeneration

pytestmark = pytest.mark.versions

# Runs in a separate process: typical use of a checkpoint, with the transformers installed in a folder.
USE = """
import sys, warnings
overlay, checkpoint, media, out = sys.argv[1:]
sys.path.insert(0, overlay)

BLOCKED = ("empathic", "trl", "datasets", "evaluate", "peft", "accelerate", "mamba_ssm", "torchvision", "librosa")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util
find_spec = importlib.util.find_spec  # transformers uses it to find out what is installed
def is_installed(name, package=None):
    return None if name.split(".")[0] in BLOCKED else find_spec(name, package)
importlib.util.find_spec = is_installed
sys.meta_path.insert(0, Blocker())
warnings.simplefilter("error", FutureWarning)  # transformers' deprecations

import logging, torch, transformers
from transformers import AutoModelForMultimodalLM, AutoProcessor
assert transformers.__file__.startswith(overlay), transformers.__file__
logged = []
class Collect(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())
logging.getLogger("transformers").addHandler(Collect())
torch.set_num_threads(1)
model, info = AutoModelForMultimodalLM.from_pretrained(checkpoint, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
audio, video = {"type": "audio", "path": media}, {"type": "video", "path": media}
def user(*content):
    return {"role": "user", "content": list(content)}
said = {"type": "text", "text": "i did not expect that."}
history = [user({"type": "text", "text": "i have a horse called tiger."}), {"role": "assistant", "content": "i see."}]
conversations = {
    "text": [user(said)],
    "media": [user(audio, video, said)],
    "history": [*history, user(said)],
    "all": [*history, user(audio, video, said)],
}
results = {}
kwargs = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
for name, messages in conversations.items():
    inputs = processor.apply_chat_template(messages, **kwargs)
    with torch.no_grad():
        logits = model(**inputs).logits
        # In two steps, with the key-value cache under the name of this transformers version.
        whole = model(**inputs, use_cache=True)
        cache = whole["cache" if "cache" in whole else "past_key_values"]
        answer = processor.encode_reply("i see.")
        later = model(input_ids=torch.tensor([answer]), **{"cache" if "cache" in whole else "past_key_values": cache})
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    sampled = model.generate(**inputs, max_new_tokens=5, num_beams=2, do_sample=False)
    reply = processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    results[name] = {"logits": logits, "later": later.logits, "reply": reply, "ids": ids, "beams": sampled}
batch = processor.apply_chat_template(list(conversations.values()), processor_kwargs={"padding": True}, **kwargs)
results["batch"] = {"ids": model.generate(**batch, max_new_tokens=5, do_sample=False)}

# A memory that is read in pieces equals a memory that is read at once.
ids = torch.tensor([[i for m in history for i in processor.encode_utterance(m["role"], m["content"])]])
with torch.no_grad():
    vectors = model.get_memory_features(ids)
state, pieces = model.new_memory_state(), []
for piece in ids.split(3, dim=1):
    pieces.append(model.append_to_memory(state, piece))
assert len(vectors) == 2 and torch.allclose(torch.cat(pieces), vectors, atol=1e-5)
results["memory"] = {"vectors": vectors}

# Gradients through the memory are the same under activation checkpointing.
def gradient():
    model.zero_grad()
    model.get_memory_features(ids).square().sum().backward()
    return model.model.memory.mem_embedding.grad.clone()
plain = gradient()
mamba = model.model.memory.mamba
getattr(mamba, "activation_checkpointing_enable", mamba.gradient_checkpointing_enable)({"use_reentrant": False})
model.train()
assert torch.allclose(gradient(), plain, rtol=1e-4, atol=1e-6)
model.eval()

model.save_pretrained(out + "/saved")
processor.save_pretrained(out + "/saved")
assert not [name for name in sys.modules if name.split(".")[0] in BLOCKED]
results["version"], results["logged"] = transformers.__version__, logged
torch.save(results, out + "/results.pt")
"""

OVERLAYS = Path(os.environ.get("EMPATHIC_VERSIONS", ".versions"))


def minors():
    first, last = Version(OLDEST_TESTED), Version(NEWEST_TESTED)
    return [f"{first.major}.{minor}" for minor in range(first.minor, last.minor + 1)]


@pytest.fixture(scope="module")
def checkpoint(base_folder):
    return os.environ.get("EMPATHIC_CHECKPOINT") or base_folder


@pytest.fixture(scope="module")
def mamba2_checkpoint(parts, processor, tmp_path_factory):
    """A Mamba-2 memory with two groups, which transformers before 5.23 would normalize together."""
    folder = tmp_path_factory.mktemp("mamba2")
    sizes = dict(hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(parts["memory"])
    Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer) + 3, **sizes)).save_pretrained(folder / "memory")
    tokenizer.save_pretrained(folder / "memory")
    qformer = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    EmpathicForConditionalGeneration.from_parts_pretrained(
        **{**parts, "memory": str(folder / "memory")}, num_query_tokens=4, num_frames=2,
        video_qformer_config=qformer, audio_qformer_config=qformer,
    ).save_pretrained(folder / "model")  # fmt: skip
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def use(checkpoint, clip, tmp_path_factory):
    """A function (minor version, folder) -> the results of a process that uses the checkpoint with that version."""
    known = {}

    def run(minor, folder=checkpoint):
        if (minor, folder) not in known:
            overlay = (OVERLAYS / minor).resolve()
            assert overlay.is_dir(), f"{overlay} is missing: run `make test-versions`, which installs it."
            out = tmp_path_factory.mktemp(f"with-{minor}")
            environment = {**os.environ, "HF_MODULES_CACHE": str(out / "modules"), "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-I", "-c", USE, str(overlay), str(folder), clip, str(out)]
            done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            results = torch.load(out / "results.pt")
            assert Version(results["version"]).release[:2] == Version(minor).release
            known[minor, folder] = results, out / "saved"
        return known[minor, folder]

    return run


def compare(found, expected):
    for name in ("text", "media", "history", "all", "batch", "memory"):
        for key, value in expected[name].items():
            if isinstance(value, str):
                assert found[name][key] == value, (name, key)
            elif value.is_floating_point():
                torch.testing.assert_close(found[name][key], value, rtol=1e-4, atol=1e-4, msg=f"{name} {key}")
            else:
                assert torch.equal(found[name][key], value), (name, key)


@pytest.mark.parametrize("minor", minors())
def test_every_minor_version_gives_the_same(use, minor):
    found, _ = use(minor)
    compare(found, use(NEWEST_TESTED)[0])
    assert not [text for text in found["logged"] if "deprecated" in text or "newer than" in text]


def test_a_mamba2_memory_is_the_same_at_both_ends(use, mamba2_checkpoint):
    compare(use(OLDEST_TESTED, mamba2_checkpoint)[0], use(NEWEST_TESTED, mamba2_checkpoint)[0])


@pytest.mark.parametrize("saver, loader", [(OLDEST_TESTED, NEWEST_TESTED), (NEWEST_TESTED, OLDEST_TESTED)])
def test_what_one_end_saves_the_other_loads(use, saver, loader):
    expected, saved = use(saver)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "empathic"
    compare(use(loader, str(saved))[0], expected)

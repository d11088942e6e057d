"""Random models and checkpoints: initial values, saving and loading, with and without the package."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForMultimodalLM, Mamba2Config

from empathic.chat import ChatSession
from empathic.memory_empathic import Projector
from empathic.modeling_empathic import EmpathicForConditionalGeneration, EmpathicModel

TENSORS = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


def conversation(clip):
    media = [{"type": "audio", "path": clip}, {"type": "video", "path": clip}]
    turn = {"role": "user", "content": [*media, {"type": "text", "text": "how are you"}]}
    return [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "i am fine"}, turn]


@pytest.fixture(scope="module")
def full(processor, clip):
    """One conversation with history, audio, video and text."""
    return processor.apply_chat_template(conversation(clip), **TENSORS)


def logits_of(model, inputs, **kwargs):
    """Use float64, so that a kernel's summation order, which depends on a tensor's alignment, does not matter."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(**inputs, **kwargs).logits


def same(one, two):
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5)


def random_inputs(config, generator=None):
    """Inputs of a model of `tiny_config`: the first row has all modalities, the second no media and no memory."""
    video, audio, memory = config.video_token_id, config.audio_token_id, config.memory_token_id
    n, mem, window = config.num_query_tokens, config.mem_token_id, 2 * config.audio_config.max_source_positions
    first = [5, *[memory] * 2, *[audio] * n, 6, *[video] * n, 7, 8]
    return dict(
        input_ids=torch.tensor([first, [9] * len(first)]),
        attention_mask=torch.ones(2, len(first), dtype=torch.long),
        pixel_values_videos=torch.randn(2, config.num_frames, 3, 32, 32, generator=generator),
        video_mask=torch.tensor([[1] * config.num_frames, [0] * config.num_frames]),
        input_features=torch.randn(2, config.audio_config.num_mel_bins, window, generator=generator),
        input_features_mask=torch.tensor([[1] * 11 + [0] * (window - 11), [0] * window]),
        memory_input_ids=torch.tensor([[3, 4, mem, 5, mem], [0] * 5]),
        memory_attention_mask=torch.tensor([[1] * 5, [0] * 5]),
    )


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("memory", ["mamba", "mamba2"])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_on_any_layer_learns_and_acts_before_it_is_merged_as_after(tiny_config, memory, dora):
    """A layer whose weight is read, and which is not called, would leave its adapter without effect until the merge."""
    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
    small |= {} if memory == "mamba" else {"head_dim": 16, "num_heads": 4, "n_groups": 1}
    config = tiny_config(memory_config={"model_type": memory, **small})
    model = EmpathicForConditionalGeneration(config).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {"in_proj", "out_proj", "linear", "lm_head"} <= {name.rpartition(".")[2] for name in names}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, use_dora=dora)).eval()
    inputs = random_inputs(config)
    start = logits_of(adapted, inputs)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if "lora_B" in name}
    untrained = [name for name, grad in grads.items() if grad is None or not grad.any()]
    assert len(grads) == len(names) and not untrained
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    acting = logits_of(adapted, inputs)
    assert not torch.allclose(acting, start, atol=1e-3)
    assert torch.allclose(acting, logits_of(adapted.merge_and_unload(), inputs), atol=1e-4)


# ------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("memory", ["mamba", "mamba2"])
def test_save_and_load_keep_the_logits_and_every_key(tiny_config, tmp_path, tie, memory):
    text = {**tiny_config().text_config.to_dict(), "tie_word_embeddings": tie}
    parts = {"text_config": text}
    if memory == "mamba2":
        parts["memory_config"] = Mamba2Config(
            vocab_size=50, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2
        )
    config = tiny_config(**parts)
    torch.manual_seed(0)
    model = EmpathicForConditionalGeneration(config).eval()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied is tie
    inputs = random_inputs(config)
    before = logits_of(model, inputs)
    assert before.shape == (2, inputs["input_ids"].shape[1], 120) and before.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded, info = EmpathicForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tie
    assert same(logits_of(loaded, inputs), before)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_checkpoint_that_lacks_or_adds_a_tensor_says_so(base_folder, model, tmp_path):
    state = model.state_dict()
    state.pop("model.video_query_tokens")
    state["model.video_projector.extra"] = torch.zeros(1)
    model.save_pretrained(tmp_path, state_dict=state)
    _, info = EmpathicForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.video_query_tokens"}
    assert set(info["unexpected_keys"]) == {"model.video_projector.extra"}
    with pytest.raises(ValueError, match=r"missing: model.video_query_tokens; unexpected: model.video_projector.extra"):
        EmpathicForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model.video_query_tokens; unexpected"):
        AutoModelForMultimodalLM.from_pretrained(tmp_path)


def test_a_session_with_an_offloaded_memory(base_folder, model, processor, tmp_path):
    places = {f"model.{name}": "cpu" for name, _ in model.model.named_children()} | {"lm_head": "cpu"}
    places |= {f"model.{kind}_query_tokens": "cpu" for kind in ("video", "audio")} | {"model.memory": "disk"}
    loaded = EmpathicForConditionalGeneration.from_pretrained(base_folder, device_map=places, offload_folder=tmp_path)
    sessions = [ChatSession(each, processor) for each in (model, loaded)]
    for text in ("hello there", "how are you"):
        first, second = (session.reply(text, max_new_tokens=4) for session in sessions)
        assert first == second


@pytest.mark.parametrize("trust", [True, False, None])
def test_auto_classes_where_the_package_is_imported(base_folder, model, full, trust):
    kwargs = {} if trust is None else {"trust_remote_code": trust}
    loaded, info = AutoModelForMultimodalLM.from_pretrained(base_folder, output_loading_info=True, **kwargs)
    assert type(loaded) is EmpathicForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(logits_of(loaded, full), logits_of(model, full))


def test_auto_model_is_the_body_without_the_head(base_folder, model, full):
    body, info = AutoModel.from_pretrained(base_folder, output_loading_info=True)
    assert type(body) is EmpathicModel and not info["missing_keys"]
    with torch.no_grad():
        hidden = body.double()(**full)
    assert hidden.last_hidden_state.shape == (*full["input_ids"].shape, 32)
    assert hidden.video_vectors.shape == (1, 4, 32) and hidden.memory_vectors.shape == (2, 32)
    assert same(model.double().lm_head(hidden.last_hidden_state), logits_of(model, full))


PLAIN_PROCESS = """
import sys, torch
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
torch.set_num_threads(1)
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor
folder, clip, out = sys.argv[1:]
model, info = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [
    {"role": "user", "content": "hello there"},
    {"role": "user", "content": [{"type": "audio", "path": clip}, {"type": "video", "path": clip},
                                 {"type": "text", "text": "how are you"}]},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
import copy
with torch.no_grad():
    logits = copy.deepcopy(model).double()(**inputs).logits
ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(body).__name__ == "EmpathicModel"
again = out + "/again"
model.save_pretrained(again); processor.save_pretrained(again)
twice = AutoModelForMultimodalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.allclose(twice.double()(**inputs).logits, logits, atol=1e-5)
AutoProcessor.from_pretrained(again, trust_remote_code=True)
assert not [name for name in sys.modules if name.split(".")[0] in BLOCKED]
torch.save({"inputs": dict(inputs), "logits": logits, "ids": ids}, out + "/out.pt")
"""


def test_the_checkpoint_loads_where_the_package_is_not_installed(base_folder, model, processor, clip, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", PLAIN_PROCESS, base_folder, clip, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "out.pt")
    messages = conversation(clip)
    messages.pop(1)
    inputs = processor.apply_chat_template(messages, **TENSORS)
    assert set(inputs) == set(there["inputs"])
    assert all(torch.equal(inputs[key], there["inputs"][key]) for key in inputs)
    assert same(logits_of(model, inputs), there["logits"])
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), there["ids"])


# ------------------------------------------------------------------------------------------------------ initial state


def test_random_models_leave_no_garbage(tiny_config):
    qformer = {**tiny_config().video_qformer_config.to_dict(), "initializer_range": 0.3}
    text = {**tiny_config().text_config.to_dict(), "initializer_range": 0.05}
    config = tiny_config(
        video_qformer_config=qformer, text_config=text, num_query_tokens=64, embedding_scale=0.4, mem_token_id=49
    )
    config.memory_config.initializer_range = 0.1
    torch.manual_seed(0)
    torch.empty(1 << 20).fill_(float("nan"))  # memory that is likely to be reused
    for model in (EmpathicForConditionalGeneration(config), AutoModelForMultimodalLM.from_config(config)):
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.isfinite().all(), name
        body = model.model
        assert body.video_query_tokens.std().item() == pytest.approx(0.3, rel=0.1)
        assert body.audio_query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
        assert body.memory.mem_embedding.std().item() == pytest.approx(0.1, rel=0.4)
        assert body.language_model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.1)
        for projector in (body.video_projector, body.audio_projector, body.memory.projector):
            assert projector.scale.item() == pytest.approx(0.4)
            assert projector.linear.weight.std().item() == pytest.approx(projector.linear.in_features**-0.5, rel=0.1)
            assert not projector.linear.bias.any()


def test_missing_tensors_are_initialised_on_load(tiny_config, tmp_path):
    """With output_loading_info, tensors that a checkpoint lacks are initialized as in a new model."""
    config = tiny_config(num_query_tokens=64)
    model = EmpathicForConditionalGeneration(config)
    new = ("query_tokens", "projector", "mem_embedding")
    state = {k: v for k, v in model.state_dict().items() if not any(part in k for part in new)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = EmpathicForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)[0].model
    assert loaded.video_query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert loaded.memory.mem_embedding.std().item() == pytest.approx(config.memory_config.initializer_range, rel=0.4)
    for projector in (loaded.video_projector, loaded.audio_projector, loaded.memory.projector):
        assert projector.scale.item() == pytest.approx(config.embedding_scale)
        assert projector.linear.weight.std().item() == pytest.approx(projector.linear.in_features**-0.5, rel=0.1)


def test_all_vectors_start_at_the_scale_of_the_embeddings(model, full):
    norms = model.get_input_embeddings().weight.norm(dim=-1) / 32**0.5
    scale = norms.median()
    assert model.config.embedding_scale == pytest.approx(scale.item(), rel=1e-5)
    with torch.no_grad():
        outputs = model(**full)
    for vectors in (outputs.video_vectors, outputs.audio_vectors, outputs.memory_vectors):
        rms = vectors.square().mean(-1).sqrt()
        assert torch.allclose(rms, scale.expand_as(rms), rtol=1e-3)


def test_projector_output_has_the_scale_it_was_given():
    torch.manual_seed(0)
    for width in (8, 300):
        vectors = Projector(width, 64, 0.7)(torch.randn(5, width) * 30)
        assert torch.allclose(vectors.square().mean(-1).sqrt(), torch.full((5,), 0.7), rtol=1e-4)


def test_an_unknown_memory_encoder_is_an_error(tiny_config):
    text = tiny_config().text_config.to_dict()
    with pytest.raises(ValueError, match=r"memory_config has the model type 'qwen2'; .*'mamba' or 'mamba2'"):
        EmpathicForConditionalGeneration(tiny_config(memory_config=text))


LLAMA = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
GPT2 = dict(model_type="gpt2", n_embd=32, n_layer=1, n_head=4)
NEOX = dict(model_type="gpt_neox", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


@pytest.mark.parametrize("text", [LLAMA, GPT2, NEOX], ids=["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tie", [True, False])
def test_another_causal_lm(tiny_config, tmp_path, text, tie):
    text = dict(text, vocab_size=120, tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2)
    config = tiny_config(text_config=text)
    model = EmpathicForConditionalGeneration(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tie
    inputs = random_inputs(config)
    model.save_pretrained(tmp_path)
    loaded, info = EmpathicForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded.model.language_model) is type(model.model.language_model)
    assert same(logits_of(loaded, inputs), logits_of(model, inputs))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tie
    ids = [model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*ids)

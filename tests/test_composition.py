"""Models composed from four pretrained parts, and from stage folders and their base."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    Gemma2Config,
    GraniteConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    PhiConfig,
    WhisperForConditionalGeneration,
)

from empathic.composition_empathic import PARTS_FILE, PRETRAINED_PREFIXES, STAGE_FILE, read_stage, resolve_base
from empathic.modeling_empathic import EmpathicForConditionalGeneration
from empathic.processing_empathic import EmpathicProcessor
from empathic.trainers.checkpoints.stage_folder import StageRecord, load_model, merge, new_tensors

QFORMER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
LLM = {**QFORMER, "num_key_value_heads": 2, "initializer_range": 0.2}
SIZES = dict(num_query_tokens=4, num_frames=2, video_qformer_config=QFORMER, audio_qformer_config=QFORMER)


def compose(parts, **kwargs):
    return EmpathicForConditionalGeneration.from_parts_pretrained(**{**parts, **SIZES, **kwargs})


@pytest.fixture(scope="module")
def inputs(processor, clip):
    messages = [
        {"role": "user", "content": "hello there"},
        {
            "role": "user",
            "content": [
                {"type": "audio", "path": clip},
                {"type": "video", "path": clip},
                {"type": "text", "text": "i"},
            ],
        },
    ]
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def logits_of(model, inputs):
    """
    Compute logits in float64. Tensors read from a file have another alignment, and matrix kernels then sum in another
    order: in float32 this changes logits near 10 by 1e-5, as much as some real differences.
    """
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(**inputs).logits


def same(one, two):
    return torch.allclose(one, two, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- four parts


def test_every_pretrained_tensor_is_in_the_model(parts):
    torch.manual_seed(0)
    state = compose(parts).state_dict()
    text = AutoModelForCausalLM.from_pretrained(parts["text"]).state_dict()
    clip = CLIPModel.from_pretrained(parts["vision"]).state_dict()
    whisper = WhisperForConditionalGeneration.from_pretrained(parts["audio"]).state_dict()
    mamba = MambaForCausalLM.from_pretrained(parts["memory"]).state_dict()
    expected = {k.replace("model.", "model.language_model.", 1): v for k, v in text.items()}
    for source, old, new in (
        (clip, "vision_model.", "model.vision_tower."),
        (whisper, "model.encoder.", "model.audio_tower."),
        (mamba, "backbone.", "model.memory.mamba."),
    ):
        expected |= {new + k.removeprefix(old): v for k, v in source.items() if k.startswith(old)}
    assert len(expected) > 100 and "lm_head.weight" in expected
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    new = set(state) - set(expected)
    assert not any(name.startswith(PRETRAINED_PREFIXES) for name in new)
    assert {name.split(".")[1] for name in new} == {
        "video_qformer", "audio_qformer", "video_query_tokens", "audio_query_tokens", "video_projector",
        "audio_projector", "memory",
    }  # fmt: skip


def test_new_tensors_are_initialised_and_follow_the_seed(parts):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.empty(1 << 18).fill_(float("nan"))  # memory that is likely to be reused
        models.append(compose(parts, num_query_tokens=64))
    names = new_tensors(models[0])
    for name, *tensors in zip(names, *([m.get_parameter(n) for n in names] for m in models), strict=True):
        assert tensors[0].isfinite().all() and torch.equal(tensors[0], tensors[1]), name
    body = models[0].model
    assert not torch.equal(body.video_query_tokens, models[2].model.video_query_tokens)
    assert body.video_query_tokens.std().item() == pytest.approx(0.02, rel=0.1)
    assert body.video_qformer.encoder.layer[0].attention.attention.query.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert body.memory.mem_embedding.std().item() == pytest.approx(0.1, rel=0.4)
    for projector in (body.video_projector, body.audio_projector, body.memory.projector):
        assert projector.scale.item() == pytest.approx(models[0].config.embedding_scale)
        assert projector.linear.weight.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert not any(module.training for module in models[0].modules())


def test_composing_is_quiet(parts, caplog):
    with caplog.at_level(logging.WARNING):
        compose(parts)
        EmpathicProcessor.from_parts_pretrained(**parts)
    assert not caplog.records, [record.getMessage() for record in caplog.records]


def test_a_vision_tower_alone_gives_the_same(parts, tmp_path):
    CLIPModel.from_pretrained(parts["vision"]).vision_model.save_pretrained(tmp_path / "vision")
    one, two = compose(parts), compose({**parts, "vision": str(tmp_path / "vision")})
    for (name, a), b in zip(one.model.vision_tower.state_dict().items(), two.model.vision_tower.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    assert type(one.model.vision_tower) is type(two.model.vision_tower) is CLIPVisionModel
    assert one.config.vision_config.model_type == two.config.vision_config.model_type == "clip_vision_model"


def test_the_composed_model_saves_and_loads(parts, inputs, tmp_path):
    model = compose(parts)
    model.save_pretrained(tmp_path)
    loaded, info = EmpathicForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(logits_of(loaded, inputs), logits_of(model, inputs))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["model_type"] == "empathic"
    assert not [path for path in parts.values() if path in text]  # no local folders


def test_untied_embeddings_and_generation_settings_come_from_the_text_model(parts, inputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(parts["text"])
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.generation_config.update(do_sample=True, temperature=0.7, suppress_tokens=[3])
    model.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(parts["text"]).save_pretrained(tmp_path / "text")
    composed = compose({**parts, "text": str(tmp_path / "text")})
    assert composed.config.tie_word_embeddings is False
    assert torch.equal(composed.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(composed.lm_head.weight, composed.get_input_embeddings().weight)
    composed.save_pretrained(tmp_path / "whole")
    loaded = EmpathicForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert same(logits_of(loaded, inputs), logits_of(composed, inputs))
    for one in (composed, loaded):
        assert one.generation_config.temperature == 0.7 and one.generation_config.do_sample is True
        assert 3 in one.generation_config.suppress_tokens and len(one.generation_config.suppress_tokens) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "auto"])
def test_one_dtype_for_all_parts(parts, inputs, tmp_path, dtype):
    if dtype == "auto":  # the LLM's dtype is used, even if a tower was saved in another dtype
        folder = str(tmp_path / "text")
        AutoModelForCausalLM.from_pretrained(parts["text"], dtype="bfloat16").save_pretrained(folder)
        AutoTokenizer.from_pretrained(parts["text"]).save_pretrained(folder)
        parts = {**parts, "text": folder}
    model = compose(parts, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert logits_of(model, inputs).isfinite().all()


def test_attention_of_the_parts(parts):
    body = compose(parts, attn_implementation="eager").model
    towers = (body.language_model, body.vision_tower, body.audio_tower, body.video_qformer, body.audio_qformer)
    assert {part.config._attn_implementation for part in towers} == {"eager"}


def test_a_mamba2_memory(parts, inputs, tmp_path):
    config = Mamba2Config(
        vocab_size=340, hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2, num_hidden_layers=2
    )
    mamba = Mamba2ForCausalLM(config)
    mamba.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(parts["memory"]).save_pretrained(tmp_path)
    model = compose({**parts, "memory": str(tmp_path)})
    expected = mamba.backbone.state_dict()
    for name, tensor in model.model.memory.mamba.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = inputs["memory_input_ids"]
    state = model.new_memory_state()
    streamed = torch.cat([model.append_to_memory(state, piece) for piece in ids.split(2, dim=1)])
    assert torch.allclose(streamed, model.get_memory_features(ids), atol=1e-6)


def test_model_and_processor_agree_on_the_tokens(parts):
    for options in ({}, {"video_token": "<|quad_start|>", "memory_token": "<|box_end|>"}):
        model = compose(parts, **options)
        processor = EmpathicProcessor.from_parts_pretrained(**parts, **options)
        for name in ("video", "audio", "memory"):
            token = getattr(processor, f"{name}_token")
            assert token == options.get(f"{name}_token", token)
            assert getattr(model.config, f"{name}_token_id") == processor.tokenizer.convert_tokens_to_ids(token)
        assert model.config.mem_token_id == processor.mem_token_id
        # no table was resized: <MEM> has its own vector, and the placeholders are existing rows
        assert model.get_input_embeddings().num_embeddings == model.config.text_config.vocab_size == 350


def test_a_text_tokenizer_without_placeholders_needs_an_option(parts, tmp_path):
    folder = str(tmp_path)
    AutoModelForCausalLM.from_pretrained(parts["text"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(parts["memory"])  # a vocabulary without unused tokens
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    other = {**parts, "text": folder}
    for make in (compose, lambda p, **k: EmpathicProcessor.from_parts_pretrained(**p, **k)):
        with pytest.raises(ValueError, match=r"none of .*video_pad.*video_token="):
            make(other)
        make(other, video_token="<|padding|>", audio_token="Ā", memory_token="ā")


# ------------------------------------------------------------------------------------------------------ stage folders


def write_parts_stage(model, base, folder, names, stage="emotion"):
    """Write the output of a stage that trains parts: new values for some tensors."""
    folder.mkdir(parents=True)
    tensors = {name: torch.randn_like(model.get_parameter(name)) * 0.3 for name in names}
    save_file(tensors, folder / PARTS_FILE)
    StageRecord(stage, base, names).save(model, str(folder))
    with torch.no_grad():
        for name, tensor in tensors.items():
            model.get_parameter(name).copy_(tensor)
    return model


@pytest.fixture
def house(base_folder, tmp_path):
    """`house/base`, a stage `house/one` with this base that trained three tensors, and the trained model."""
    torch.manual_seed(0)
    shutil.copytree(base_folder, tmp_path / "house" / "base")
    base = str(tmp_path / "house" / "base")
    names = ["model.video_query_tokens", "model.video_projector.linear.weight", "model.memory.mem_embedding"]
    model = EmpathicForConditionalGeneration.from_pretrained(base)
    model = write_parts_stage(model, base, tmp_path / "house" / "one", names)
    return tmp_path / "house", model


def write_adapter_stage(base, folder, stage="dialogue"):
    model = load_model(str(base))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    peft_model = get_peft_model(model, config)
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(folder)
    if stage is not None:
        StageRecord(stage, str(base), []).save(peft_model.get_base_model(), str(folder))
    return peft_model


def test_a_stage_folder_loads_as_a_whole_model(house, inputs):
    folder, trained = house
    expected = logits_of(trained, inputs)
    assert read_stage(folder / "one")["base"] == "../base"
    moved = shutil.move(folder, folder.parent / "elsewhere")  # base and stage may move together
    for load in (
        EmpathicForConditionalGeneration.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
        load_model,
    ):
        path = os.path.join(moved, "one")
        assert same(logits_of(load(path), inputs), expected)
    model, info = AutoModelForMultimodalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and same(logits_of(model, inputs), expected)
    base = EmpathicForConditionalGeneration.from_pretrained(os.path.join(moved, "base"))
    assert not torch.allclose(logits_of(base, inputs), expected, atol=1e-3)


def test_a_relative_path_works_from_anywhere(house, inputs, monkeypatch):
    folder, trained = house
    monkeypatch.chdir(folder / "one")
    assert torch.equal(
        logits_of(EmpathicForConditionalGeneration.from_pretrained("."), inputs), logits_of(trained, inputs)
    )
    monkeypatch.chdir(folder)
    assert same(logits_of(load_model("one"), inputs), logits_of(trained, inputs))


def test_a_stage_on_four_parts_takes_what_they_can_be_loaded_with(parts, tmp_path):
    base = {**parts, **SIZES}
    folder = tmp_path / "stage"
    write_parts_stage(compose(parts), base, folder, ["model.video_query_tokens"])
    load = EmpathicForConditionalGeneration.from_pretrained
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="four pretrained parts, which cannot be loaded with device_map, nonsense"):
        load(folder, device_map="auto", nonsense=1)


def test_a_stage_whose_trained_tensors_were_offloaded_is_refused(house, tmp_path):
    folder, model = house
    places = {name: "cpu" for name, _ in model.model.named_children()} | {"memory": "disk"}
    places = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    places |= {f"model.{kind}_query_tokens": "cpu" for kind in ("video", "audio")}
    with pytest.raises(ValueError, match=r"`device_map` offloaded model.memory.mem_embedding.*empathic merge"):
        EmpathicForConditionalGeneration.from_pretrained(
            folder / "one", device_map=places, offload_folder=tmp_path / "offload"
        )


def test_how_files_are_fetched_is_not_kept(parts):
    model = compose(parts, token="hf_secret", local_files_only=True)
    assert "hf_secret" not in model.config.to_json_string() and "local_files_only" not in model.config.to_dict()
    processor = EmpathicProcessor.from_parts_pretrained(**parts, token="hf_secret")
    assert "hf_secret" not in processor.to_json_string()
    with pytest.raises(TypeError, match="unexpected arguments: device_map, num_querry_tokens"):
        compose(parts, num_querry_tokens=4, device_map="auto")


@pytest.mark.parametrize(
    "config", [GraniteConfig(logits_scaling=8.0, **LLM), Gemma2Config(head_dim=8, **LLM), PhiConfig(**LLM)]
)
def test_a_language_model_whose_head_is_more_than_a_matrix_is_refused(parts, config, tmp_path):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(parts["text"])
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adds a bias to its logits, scales or caps them"):
        compose({**parts, "text": str(tmp_path)})


def test_options_reach_the_base(house):
    folder, _ = house
    for load in (EmpathicForConditionalGeneration.from_pretrained, AutoModelForMultimodalLM.from_pretrained):
        model = load(str(folder / "one"), dtype="bfloat16", attn_implementation="eager")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        body = model.model
        assert model.config._attn_implementation == "eager"
        for part in (body.language_model, body.vision_tower, body.audio_tower, body.video_qformer):
            assert part.config._attn_implementation == "eager"
        model = load(str(folder / "one"), attn_implementation={"text_config": "eager"})
        assert model.model.language_model.config._attn_implementation == "eager"
        assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_stages_stand_on_stages(house, inputs, tmp_path):
    folder, model = house
    names = ["model.audio_query_tokens", "model.memory.projector.scale"]
    expected = logits_of(write_parts_stage(model, str(folder / "one"), folder / "two", names, "memory_single"), inputs)
    for load in (EmpathicForConditionalGeneration.from_pretrained, AutoModelForMultimodalLM.from_pretrained):
        assert same(logits_of(load(str(folder / "two")), inputs), expected)
    adapted = write_adapter_stage(folder / "two", folder / "three")
    expected_adapted = logits_of(adapted, inputs)
    assert not torch.allclose(expected, expected_adapted, atol=1e-3)
    for load in (
        EmpathicForConditionalGeneration.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
        load_model,
    ):
        assert same(logits_of(load(str(folder / "three")), inputs), expected_adapted)
    EmpathicProcessor.from_pretrained(folder / "base").save_pretrained(folder / "three")
    merge(str(folder / "three"), str(tmp_path / "merged"))
    assert not {STAGE_FILE, "adapter_config.json"} & set(os.listdir(tmp_path / "merged"))
    shutil.rmtree(folder)  # the merged model needs no base
    merged, info = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert same(logits_of(merged, inputs), expected_adapted)
    assert merged.config.architectures == ["EmpathicForConditionalGeneration"]


def test_an_adapter_moves_with_its_base(house, inputs):
    folder, _ = house
    expected = logits_of(write_adapter_stage(folder / "one", folder / "three"), inputs)
    moved = shutil.move(folder, folder.parent / "elsewhere")
    for load in (
        EmpathicForConditionalGeneration.from_pretrained,
        AutoModelForMultimodalLM.from_pretrained,
        load_model,
    ):
        assert same(logits_of(load(os.path.join(moved, "three")), inputs), expected)


def test_a_plain_adapter_on_a_stage_or_a_whole_model(house, inputs):
    """A PEFT folder without a stage file, as `EPOTrainer` saves it outside the stages."""
    folder, _ = house
    for base, name in (("one", "on a stage"), ("base", "on a whole model")):
        expected = logits_of(write_adapter_stage(folder / base, folder / name, stage=None), inputs)
        loaded = AutoModelForMultimodalLM.from_pretrained(str(folder / name))
        assert same(logits_of(loaded, inputs), expected), name
    # a folder with a whole model and an adapter
    shutil.copytree(folder / "base", folder / "both")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "on a whole model" / file, folder / "both")
    for load in (EmpathicForConditionalGeneration.from_pretrained, AutoModelForMultimodalLM.from_pretrained):
        assert same(logits_of(load(str(folder / "both")), inputs), expected)


def test_the_first_stage_stands_on_four_parts(parts, inputs, tmp_path):
    model = compose(parts)
    names = new_tensors(model)
    model = write_parts_stage(model, {**parts, **SIZES}, tmp_path / "first", names)
    for load in (EmpathicForConditionalGeneration.from_pretrained, AutoModelForMultimodalLM.from_pretrained):
        loaded = load(str(tmp_path / "first"))
        assert same(logits_of(loaded, inputs), logits_of(model, inputs))
    assert resolve_base(str(tmp_path / "first"), "org/name") == "org/name"
    half = AutoModelForMultimodalLM.from_pretrained(str(tmp_path / "first"), dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_parts_beside_the_stage_are_found_wherever_the_tree_lies(parts, inputs, tmp_path):
    for name, path in parts.items():
        shutil.copytree(path, tmp_path / "tree" / name)
    near = {name: str(tmp_path / "tree" / name) for name in parts}
    model = compose(near)
    write_parts_stage(model, {**near, **SIZES}, tmp_path / "tree" / "first", new_tensors(model))
    record = json.loads((tmp_path / "tree" / "first" / STAGE_FILE).read_text())
    record["base"] |= {name: f"../{name}" for name in parts}
    (tmp_path / "tree" / "first" / STAGE_FILE).write_text(json.dumps(record))
    moved = shutil.move(tmp_path / "tree", tmp_path / "elsewhere")
    loaded = EmpathicForConditionalGeneration.from_pretrained(os.path.join(moved, "first"))
    assert same(logits_of(loaded, inputs), logits_of(model, inputs))


def edit_parts(folder, change):
    tensors = load_file(folder / "one" / PARTS_FILE)
    change(tensors)
    save_file(tensors, folder / "one" / PARTS_FILE)


@pytest.mark.parametrize("change, error", [
    (lambda t: t.pop("model.video_query_tokens"), r"missing: model\.video_query_tokens\)"),
    (lambda t: t.update({"model.no_such": torch.zeros(2)}), r"unexpected: model\.no_such\)"),
    (lambda t: t.update({"model.audio_query_tokens": torch.zeros(4, 32)}), r"unexpected: model\.audio_query_tokens\)"),
    (lambda t: t.update({"model.video_query_tokens": torch.zeros(5, 32)}),
     r"of another shape: model\.video_query_tokens\)"),
    (lambda t: (t.clear(), t.update({"a": torch.zeros(1)})), r"missing: model.*model.*; unexpected: a\)"),
])  # fmt: skip
def test_a_stage_that_does_not_fit_its_base_names_the_keys(house, change, error):
    folder, _ = house
    edit_parts(folder, change)
    for load in (EmpathicForConditionalGeneration.from_pretrained, AutoModelForMultimodalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"one.{PARTS_FILE}.*{error}"):
            load(str(folder / "one"))


def test_an_incomplete_stage_folder_is_an_error(house):
    folder, _ = house
    write_adapter_stage(folder / "one", folder / "three")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "three" / file).unlink()
    with pytest.raises(ValueError, match=r"three .*'dialogue'.*adapter_config\.json.*incomplete"):
        EmpathicForConditionalGeneration.from_pretrained(str(folder / "three"))
    (folder / "one" / PARTS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"one names 3 trained tensors but has no {PARTS_FILE}.*incomplete"):
        EmpathicForConditionalGeneration.from_pretrained(str(folder / "one"))
    with pytest.raises(OSError, match="no_such_folder"):
        EmpathicForConditionalGeneration.from_pretrained(str(folder / "no_such_folder"))


PLAIN_PROCESS = """
import sys, torch
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
import importlib.util
find_spec = importlib.util.find_spec  # transformers uses it to find out what is installed
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in ("empathic", "trl", "datasets", "evaluate") else find_spec(name, package)
)
torch.set_num_threads(1)
from transformers import AutoModelForMultimodalLM, AutoProcessor
out, *folders = sys.argv[1:]
inputs = torch.load(out + "/inputs.pt")
results = []
for folder in folders:
    model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        results.append(model(**inputs).logits)
torch.save(results, out + "/results.pt")
"""


def test_stage_folders_load_where_the_package_is_not_installed(house, inputs, processor, tmp_path):
    folder, trained = house
    expected = [logits_of(trained, inputs), logits_of(write_adapter_stage(folder / "one", folder / "three"), inputs)]
    for name in ("one", "three"):
        processor.save_pretrained(folder / name)
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", PLAIN_PROCESS, str(tmp_path), str(folder / "one"), str(folder / "three")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for there, here in zip(torch.load(tmp_path / "results.pt"), expected, strict=True):
        assert same(there, here)


def test_a_stage_folder_has_its_processor(house, processor):
    folder, _ = house
    processor.save_pretrained(folder / "one")
    assert type(AutoProcessor.from_pretrained(folder / "one")) is EmpathicProcessor

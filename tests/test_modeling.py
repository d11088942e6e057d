"""EmpathicModel and EmpathicForConditionalGeneration: saving and loading, masks, gradients, generation, memory."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from empathic.modeling_empathic import MEDIA_KEYS, EmpathicForConditionalGeneration
from empathic.trainers.compat import enable_activation_checkpointing

TENSORS = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
MODALITIES = {
    "video": ("pixel_values_videos", "video_mask"),
    "audio": ("input_features", "input_features_mask"),
    "memory": ("memory_input_ids", "memory_attention_mask"),
}


def sine(seconds, pitch):
    samples = 0.3 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * 16000)) / 16000)
    return {"type": "audio", "audio": samples.astype(np.float32), "sampling_rate": 16000}


def frames(*values):
    return {"type": "video", "video": np.stack([np.full((32, 32, 3), value, np.uint8) for value in values])}


def turn(text, *media):
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


ALL = [
    turn("hello there"),
    {"role": "assistant", "content": "how are you"},
    turn("about the old dog", sine(1.0, 300), frames(20, 200)),
]
MIXED = [
    ALL,
    [turn("i am fine")],
    [turn("hello", sine(3.0, 500))],  # two windows of two seconds
    [turn("how are you", frames(90))],  # one frame of two
    [turn("hello"), turn("thanks"), turn("i am fine"), turn("what did he say")],
]


@pytest.fixture(scope="module")
def full(processor):
    """One conversation with history, audio, video and text."""
    return processor.apply_chat_template(ALL, **TENSORS)


@pytest.fixture(scope="module")
def batch(processor):
    """Five conversations that lack different modalities, left-padded."""
    return processor.apply_chat_template(MIXED, padding=True, **TENSORS)


def logits_of(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def changed(inputs, **values):
    return {**inputs, **values}


# ------------------------------------------------------------------------------------------------ placeholders, masks


@pytest.mark.parametrize("modality, token, counts", [
    ("video", "<|video_pad|>", (3, 4)), ("audio", "<|vision_pad|>", (3, 4)), ("memory", "<|image_pad|>", (1, 2)),
])  # fmt: skip
def test_placeholders_that_do_not_match_are_an_error_with_both_counts(model, processor, full, modality, token, counts):
    ids = full["input_ids"].clone()
    where = (ids[0] == processor.tokenizer.convert_tokens_to_ids(token)).nonzero()[0]
    ids[0, where] = 5
    error = rf"{modality} placeholders.*\[{counts[0]}\] placeholders, \[{counts[1]}\] vectors"
    with pytest.raises(ValueError, match=error):
        model(**changed(full, input_ids=ids))


@pytest.mark.parametrize("modality, counts", [("video", "4"), ("audio", "4"), ("memory", "2")])
def test_placeholders_without_their_media_are_an_error(model, full, modality, counts):
    inputs = {key: value for key, value in full.items() if key not in MODALITIES[modality]}
    for run in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)):
        with pytest.raises(ValueError, match=rf"{modality} placeholders.*\[{counts}\] placeholders, \[0\] vectors"):
            run(**inputs)


def test_vectors_never_go_to_another_rows_placeholders(model, full):
    """Equal totals are not enough: row 0 has a clip and no placeholders, row 1 the reverse."""
    ids, width = full["input_ids"], full["input_ids"].shape[1]
    plain = torch.full((1, width), 5)
    twice = {key: torch.cat([value, torch.zeros_like(value)]) for key, value in full.items()}
    twice["attention_mask"][1] = 1
    model(**changed(twice, input_ids=torch.cat([ids, plain])))
    with pytest.raises(ValueError, match=r"\[0, 4\] placeholders, \[4, 0\] vectors"):
        model(**changed(twice, input_ids=torch.cat([plain, ids])))


@pytest.mark.parametrize("name", ["memory_embeds", "video_features"])
def test_a_former_name_of_an_input_is_not_ignored(model, full, name):
    with pytest.raises(TypeError, match=f"{name} is now called"):
        model(**full, **{name: torch.zeros(1)})


def test_memory_vectors_take_the_place_of_memory_ids(model, processor):
    conversations = [MIXED[0], MIXED[1], MIXED[4]]  # two, zero and three utterances
    inputs = dict(processor.apply_chat_template(conversations, **TENSORS))
    expected = logits_of(model, inputs)
    ids, mask = inputs.pop("memory_input_ids"), inputs.pop("memory_attention_mask")
    vectors = model.get_memory_features(ids, mask).detach()
    embeds = torch.full((3, 3, 32), 9e9)
    embeds[0, :2], embeds[2] = vectors[:2], vectors[2:]
    assert torch.allclose(logits_of(model, inputs, memory_vectors=embeds), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"\[2, 0, 3\] placeholders, \[4, 4, 4\] vectors"):
        model(**inputs, memory_vectors=torch.zeros(3, 4, 32))
    with pytest.raises(ValueError, match=r"\[2, 0, 3\] placeholders, \[1, 1, 1\] vectors"):
        model(**inputs, memory_vectors=torch.zeros(3, 1, 32))
    with pytest.raises(ValueError, match="at most one of memory_vectors and memory_input_ids"):
        model(**inputs, memory_vectors=embeds, memory_input_ids=ids, memory_attention_mask=mask)


def test_inputs_embeds_take_the_place_of_input_ids(model, full):
    inputs = dict(full)
    expected = logits_of(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.allclose(logits_of(model, inputs, inputs_embeds=embeds), expected, atol=1e-5)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**full, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**inputs)


def test_a_batch_gives_each_conversation_what_it_gets_alone(model, processor, batch):
    together = logits_of(model, batch)
    for row, conversation in enumerate(MIXED):
        alone = logits_of(model, processor.apply_chat_template(conversation, **TENSORS))[0]
        assert torch.allclose(together[row, -len(alone) :], alone, atol=2e-5), row


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_zeros_under_a_zero_mask_are_as_good_as_nothing(model, processor, implementation):
    model.set_attn_implementation(implementation)
    for conversation in MIXED:
        sample = processor.prepare(conversation)
        expected = logits_of(model, processor.pad([sample]))
        padded = logits_of(model, processor.pad([sample], all_modalities=True))
        assert torch.allclose(padded, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_masked_is_not_read_and_what_is_not_masked_is(model, batch, implementation):
    model.set_attn_implementation(implementation)
    reference = logits_of(model, batch)
    real = batch["attention_mask"].bool()

    def difference(**values):
        return (logits_of(model, changed(batch, **values)) - reference).abs().amax(-1).masked_fill(~real, 0).amax(-1)

    pixels, frame = batch["pixel_values_videos"], batch["video_mask"].bool()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    assert frame.tolist() == [[True, True], [False] * 2, [False] * 2, [True, False], [False] * 2]
    assert (difference(pixel_values_videos=torch.where(frame[..., None, None, None], pixels, noise)) < 1e-5).all()
    for row, column in ((0, 0), (0, 1), (3, 0)):
        other = pixels.clone()
        other[row, column] = noise[row, column]
        moved = difference(pixel_values_videos=other)
        assert moved[row] > 1e-4 and moved.sum() == moved[row]

    features, sounds = batch["input_features"], batch["input_features_mask"]
    window = sounds.reshape(5, 2, -1).any(-1).repeat_interleave(200, dim=1)  # windows that contain sound
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(1))
    assert (difference(input_features=torch.where(window[:, None], features, noise)) < 1e-5).all()
    for row, cut in ((0, slice(0, 50)), (2, slice(0, 200)), (2, slice(200, 250))):
        other = features.clone()
        other[row, :, cut] = noise[row, :, cut]
        moved = difference(input_features=other)
        assert moved[row] > 1e-4 and moved.sum() == moved[row]

    ids, mask = batch["memory_input_ids"], batch["memory_attention_mask"].bool()
    assert (difference(memory_input_ids=torch.where(mask, ids, model.config.mem_token_id)) < 1e-5).all()
    other = ids.clone()
    other[4, 0] += 1
    moved = difference(memory_input_ids=other)
    assert moved[4] > 1e-5 and moved.sum() == moved[4]


def test_the_qformer_does_not_read_the_tower_past_the_end_of_the_sound(model, full):
    """Whisper itself also encodes the silence, as in its training; the outputs for silence are masked."""
    reference = model.get_audio_features(full["input_features"], full["input_features_mask"]).pooler_output
    inside = full["input_features_mask"].bool()[:, ::2]
    assert inside.sum() == 50 and inside.shape == (1, 100)

    def disturb(where):
        def hook(module, args, output):
            output.last_hidden_state = output.last_hidden_state + 5.0 * where[..., None]
            return output

        handle = model.model.audio_tower.register_forward_hook(hook)
        vectors = model.get_audio_features(full["input_features"], full["input_features_mask"]).pooler_output
        handle.remove()
        return (vectors - reference).abs().max()

    assert disturb(~inside) < 1e-6
    last = torch.zeros_like(inside)
    last[:, 49] = True
    assert disturb(last) > 1e-5


def test_sound_must_fill_whole_windows(model, full):
    with pytest.raises(ValueError, match="199 time steps, not a whole number of windows of 200"):
        model.get_audio_features(full["input_features"][..., :199])


def test_feature_getters_give_batch_first_vectors(model, batch):
    video = model.get_video_features(batch["pixel_values_videos"], batch["video_mask"])
    audio = model.get_audio_features(batch["input_features"], batch["input_features_mask"])
    assert video.pooler_output.shape == (5, 4, 32) and audio.pooler_output.shape == (5, 4, 32)
    everything = torch.ones_like(batch["video_mask"])
    pixels = batch["pixel_values_videos"]
    assert torch.equal(
        model.get_video_features(pixels).pooler_output, model.get_video_features(pixels, everything).pooler_output
    )


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_features_come_in_batch_then_utterance_order(model, processor, batch):
    ids, mask = batch["memory_input_ids"], batch["memory_attention_mask"]
    vectors = model.get_memory_features(ids, mask)
    assert type(vectors) is torch.Tensor and vectors.shape == (2 + 3, 32)
    first = model.get_memory_features(ids[:1], mask[:1])
    last = model.get_memory_features(ids[4:], mask[4:])
    assert torch.allclose(vectors, torch.cat([first, last]), atol=1e-6)
    prefix = processor.prepare(MIXED[4][:2])["memory_input_ids"]  # the first utterance alone
    assert torch.allclose(last[:1], model.get_memory_features(torch.tensor([prefix])), atol=1e-6)
    nothing = model.get_memory_features(ids[1:2], mask[1:2])
    assert nothing.shape == (0, 32)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
def test_a_streamed_memory_equals_one_pass(model, processor, cut):
    ids = torch.tensor([processor.prepare(MIXED[4])["memory_input_ids"]])
    whole = model.get_memory_features(ids)
    state = model.new_memory_state()
    pieces = [model.append_to_memory(state, piece) for piece in ids.split(cut, dim=1)]
    assert all(piece.shape[1:] == (32,) for piece in pieces)
    assert torch.allclose(torch.cat(pieces), whole, atol=1e-6)
    twin = state.fork()
    one, two = model.append_to_memory(state, ids), model.append_to_memory(twin, ids)
    assert torch.equal(one, two) and not torch.allclose(one, whole, atol=1e-4)


# ------------------------------------------------------------------------------------------------ losses, gradients


def test_labels_give_the_next_token_cross_entropy(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, -3] = -100
    with torch.no_grad():
        outputs = model(**batch, labels=labels)
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    picked = targets != -100
    manual = -logits[picked].log_softmax(-1).gather(1, targets[picked, None]).mean()
    assert torch.allclose(outputs.loss, manual, atol=1e-5)
    with torch.no_grad():
        total = model(**batch, labels=labels, num_items_in_batch=10).loss
    assert torch.allclose(total, manual * picked.sum() / 10, rtol=1e-5)


def test_logits_to_keep(model, batch):
    everything = logits_of(model, batch)
    assert torch.allclose(logits_of(model, batch, logits_to_keep=3), everything[:, -3:], atol=1e-6)
    index = torch.tensor([0, 4, 7])
    assert torch.allclose(logits_of(model, batch, logits_to_keep=index), everything[:, index], atol=1e-6)


def test_return_dict_false_and_hidden_states(model, full):
    with torch.no_grad():
        as_tuple = model(**full, return_dict=False)
        outputs = model(**full, output_hidden_states=True)
    assert torch.equal(as_tuple[0], outputs.logits)
    assert len(outputs.hidden_states) == 3 and outputs.hidden_states[0].shape == (*full["input_ids"].shape, 32)


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(7)  # dropout
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_gradient_checkpointing_is_active_and_gives_the_same_gradients(model, full):
    model.train()
    for part in ("vision_tower", "audio_tower"):
        getattr(model.model, part).requires_grad_(False)
    expected = gradients(model, full)
    enable_activation_checkpointing(model, {"use_reentrant": False})
    body, runs = model.model, []
    watched = (
        body.language_model.layers[0].self_attn.q_proj,
        body.video_qformer.encoder.layer[0].attention.attention.query,
        body.audio_qformer.encoder.layer[1].attention.attention.query,
        body.memory.mamba.layers[1].mixer.in_proj,
    )
    for module in watched:
        module.register_forward_hook(lambda module, args, output: runs.append(watched.index(module)))
    checked = gradients(model, full)
    assert sorted(runs) == [0, 0, 1, 1, 2, 2, 3, 3]  # each layer runs again for the backward pass
    assert checked.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(checked[name], gradient, atol=1e-6), name


def test_every_parameter_gets_a_gradient_and_the_clips_count(model, full):
    for name, gradient in gradients(model.train(), full).items():
        # Mamba's own row of <MEM> and the key biases have gradients near zero, but every tensor must have a gradient.
        assert gradient is not None or name.startswith("model.vision_tower.post_layernorm"), name
    for name in ("video_query_tokens", "audio_query_tokens", "video_projector.linear.weight", "memory.mem_embedding"):
        assert model.get_parameter(f"model.{name}").grad.abs().max() > 0


def test_absent_modalities_give_gradients_of_zero_not_none(model, processor):
    """Under ZeRO-3 and FSDP every process must have a gradient for every trained parameter."""
    for part in ("vision_tower", "audio_tower", "language_model"):
        getattr(model.model, part).requires_grad_(False)
    inputs = processor.pad([processor.prepare([turn("hello")])], all_modalities=True)
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad and not name.startswith("memory.mamba.embeddings"):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_parts_that_are_frozen_stay_in_evaluation_mode(model, full):
    body = model.model
    parts = ("vision_tower", "audio_tower", "video_qformer", "audio_qformer", "memory")
    model.train()
    assert all(getattr(body, part).training for part in parts)
    for part in ("vision_tower", "audio_tower", "video_qformer", "memory"):
        getattr(body, part).requires_grad_(False)
    for modules in (model, body):
        modules.eval()
        modules.train()
        assert [getattr(body, part).training for part in parts] == [False, False, False, True, False]
        assert not any(m.training for m in body.video_qformer.modules())
        assert body.training and body.language_model.training
    with torch.no_grad():  # the frozen Q-former has no dropout, the trained Q-former has
        outputs = [model(**full) for _ in range(2)]
    assert torch.equal(outputs[0].video_vectors, outputs[1].video_vectors)
    assert not torch.equal(outputs[0].audio_vectors, outputs[1].audio_vectors)
    model.eval()
    assert not any(module.training for module in model.modules())


# --------------------------------------------------------------------------------------------------------- generation


def test_generate_from_embeddings_and_with_an_assistant(model, full):
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    inputs = dict(full)
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, assistant_model=copy.deepcopy(model)), expected)
    ids = inputs.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **inputs, **options), expected[:, ids.shape[1] :])


def test_generate_is_the_same_with_a_cache_without_and_by_hand(model, batch):
    inputs = dict(batch)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cached = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)
    assert torch.equal(model.generate(**inputs, **options, num_beams=1), cached)
    length = inputs["input_ids"].shape[1]
    placeholders = [model.config.video_token_id, model.config.audio_token_id, model.config.memory_token_id]
    for _ in range(6):
        logits = logits_of(model, inputs)[:, -1]
        logits[:, [model.generation_config.eos_token_id, *placeholders]] = -torch.inf  # min_new_tokens; see below
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
    assert torch.equal(cached[:, length:], inputs["input_ids"][:, length:])


def test_a_placeholder_is_never_generated(base_folder, model, full, tiny_config):
    """A generated placeholder has no vector: without a cache, the next step would fail because the counts differ."""
    placeholders = {model.config.video_token_id, model.config.audio_token_id, model.config.memory_token_id}
    for one in (model, EmpathicForConditionalGeneration.from_pretrained(base_folder)):
        assert set(one.generation_config.suppress_tokens) == placeholders
    assert EmpathicForConditionalGeneration(tiny_config()).generation_config.suppress_tokens == [111, 112, 113]
    with torch.no_grad():  # a head that always prefers placeholders
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
        model.lm_head.bias[list(placeholders)] = 9.0
    assert logits_of(model, full)[0, -1].argmax().item() in placeholders
    for use_cache in (True, False):
        ids = model.generate(**full, max_new_tokens=3, use_cache=use_cache)[0, full["input_ids"].shape[1] :]
        assert not placeholders & set(ids.tolist())


def test_media_are_read_once_with_a_cache_and_every_time_without(model, full):
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({key for key in MEDIA_KEYS if kwargs.get(key) is not None}),
        with_kwargs=True,
    )
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    model.generate(**full, **options)
    media = {key for pair in MODALITIES.values() for key in pair}
    assert seen == [media, set(), set()]
    seen.clear()
    model.generate(**full, **options, use_cache=False)
    assert seen == [media] * 3
    handle.remove()


def test_beams_and_several_sequences_keep_each_row_to_its_media(model, processor, batch):
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=2, num_return_sequences=2)
    options |= dict(return_dict_in_generate=True, output_scores=True)
    together = model.generate(**batch, **options)
    assert together.sequences.shape == (10, batch["input_ids"].shape[1] + 5)
    for row, conversation in enumerate(MIXED):
        alone = model.generate(**processor.apply_chat_template(conversation, **TENSORS), **options)
        assert torch.equal(together.sequences[2 * row : 2 * row + 2, -5:], alone.sequences[:, -5:])
        assert torch.allclose(together.sequences_scores[2 * row : 2 * row + 2], alone.sequences_scores, atol=1e-4)


def test_sampling_several_sequences(model, full):
    torch.manual_seed(0)
    ids = model.generate(**full, max_new_tokens=4, min_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert ids.shape == (3, full["input_ids"].shape[1] + 4)


def test_generate_from_memory_vectors(model, full):
    inputs = dict(full)
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=2)
    expected = model.generate(**inputs, **options)
    vectors = model.get_memory_features(inputs.pop("memory_input_ids"), inputs.pop("memory_attention_mask"))
    assert torch.equal(model.generate(**inputs, memory_vectors=vectors[None].detach(), **options), expected)


# -------------------------------------------------------------------------------------------- attention and precision


def test_attention_implementations_agree(base_folder, model, batch):
    expected = logits_of(model, batch)
    real = batch["attention_mask"].bool()

    def parts(model):
        body = model.model
        towers = (body.language_model, body.vision_tower, body.audio_tower, body.video_qformer, body.audio_qformer)
        return {part.config._attn_implementation for part in towers}

    assert parts(model) == {"sdpa"}
    for name in ("eager", "sdpa"):
        loaded = EmpathicForConditionalGeneration.from_pretrained(base_folder, attn_implementation=name)
        assert parts(loaded) == {name}
        assert torch.allclose(logits_of(loaded, batch)[real], expected[real], atol=2e-5)
        model.set_attn_implementation(name)
        assert parts(model) == {name} and model.config._attn_implementation == name
        assert torch.allclose(logits_of(model, batch)[real], expected[real], atol=2e-5)
    model.set_attn_implementation({"text_config": "eager"})
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_half_precision(base_folder, model, processor, batch, dtype):
    half = EmpathicForConditionalGeneration.from_pretrained(base_folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = logits_of(half, batch)  # the processor's float32 media are cast to half precision
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    real = batch["attention_mask"].bool()
    assert (logits.float() - logits_of(model, batch))[real].abs().mean() < 0.05
    assert half.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape[1] == real.shape[1] + 2


def test_half_precision_training_step(model, full):
    model = copy.deepcopy(model).to(torch.bfloat16).train()
    loss = model(**full, labels=full["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

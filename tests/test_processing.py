"""EmpathicProcessor: prompts and tensors of messages, batches, saving and loading."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.messages import message_text
from empathic.media_empathic import MediaError
from empathic.processing_empathic import EmpathicProcessor

AUDIO, VIDEO, MEMORY = "<|vision_pad|>" * 4, "<|video_pad|>" * 4, "<|image_pad|>"
DIALOGUE = (
    "Reply to the sentence. The memory holds what was said before, the voice and the face show how the speaker feels. "
    "Give only the reply."
)
TENSORS = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")


def user(text=None, audio=None, video=None, **keys):
    content = [] if audio is None else [{"type": "audio", **audio}]
    content += [] if video is None else [{"type": "video", **video}]
    content += [] if text is None else [{"type": "text", "text": text}]
    return {"role": "user", "content": content, **keys}


def assistant(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def sine(seconds=0.5, rate=16000):
    samples = 0.3 * np.sin(2 * np.pi * 300 * np.arange(round(seconds * rate)) / rate)
    return {"audio": samples.astype(np.float32), "sampling_rate": rate}


def grey(*values):
    return {"video": np.stack([np.full((32, 32, 3), value, np.uint8) for value in values])}


HISTORY = [user("hello there", name="Clara"), assistant("how are you"), user("i am fine", name="Clara")]


# ---------------------------------------------------------------------------------------------------------- templates


def test_dialogue_prompt_with_everything(processor):
    messages = [*HISTORY, assistant("thanks"), user("about the old dog", sine(), grey(9, 99), name="Clara")]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        f"<|im_start|>system\n{DIALOGUE}<|im_end|>\n"
        f"<|im_start|>user\nmemory:\n{MEMORY * 4}\nvoice:\n{AUDIO}\nface:\n{VIDEO}\nsentence:\nabout the old dog"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("has_audio, has_video, has_text", [c for c in itertools.product([0, 1], repeat=3) if any(c)])
def test_the_line_of_what_is_absent_is_dropped(processor, has_audio, has_video, has_text):
    turn = user("hello" if has_text else None, sine() if has_audio else None, grey(9, 99) if has_video else None)
    expected = f"<|im_start|>system\n{DIALOGUE}<|im_end|>\n<|im_start|>user\n"
    expected += f"voice:\n{AUDIO}\n" if has_audio else ""
    expected += f"face:\n{VIDEO}\n" if has_video else ""
    expected += "sentence:\nhello" if has_text else ""
    assert processor.apply_chat_template([turn]) == expected + "<|im_end|>\n"


def test_history_as_text_is_chat_turns_without_memory(processor):
    messages = [*HISTORY, user("thanks")]
    assert processor.apply_chat_template(messages, history="text", add_generation_prompt=True) == (
        f"<|im_start|>system\n{DIALOGUE}<|im_end|>\n"
        "<|im_start|>user\nClara: hello there<|im_end|>\n"
        "<|im_start|>assistant\nhow are you<|im_end|>\n"
        "<|im_start|>user\nClara: i am fine<|im_end|>\n"
        "<|im_start|>user\nsentence:\nthanks<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = processor.apply_chat_template(messages, history="text", **TENSORS)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor.memory_token not in processor.decode(batch["input_ids"][0])


def test_system_message_replaces_the_default_and_is_no_utterance(processor):
    system = {"role": "system", "content": "you are the old dog"}
    for task in ("dialogue", "emotion", "counter"):
        prompt = processor.apply_chat_template([system, user("hello")], task=task, emotion="sad", with_text=True)
        assert prompt.startswith("<|im_start|>system\nyou are the old dog<|im_end|>\n<|im_start|>user\n")
        assert prompt.count("<|im_start|>") == 2 and "memory:" not in prompt
    prompt = processor.apply_chat_template([system, *HISTORY], task="memory")
    assert prompt.startswith("<|im_start|>system\nyou are the old dog<|im_end|>\n") and prompt.count(MEMORY) == 3
    batch = processor.apply_chat_template([system, *HISTORY, assistant("thanks"), user("hello")], **TENSORS)
    assert (batch["memory_input_ids"] == processor.mem_token_id).sum() == 4
    assert "dog" not in processor.memory_tokenizer.decode(batch["memory_input_ids"][0])


@pytest.mark.parametrize("with_text", [False, True, None])
def test_emotion_prompt_has_no_history_and_an_optional_sentence(processor, with_text):
    messages = [*HISTORY, assistant("thanks"), user("old dog", sine(), grey(9, 99))]
    prompt = processor.apply_chat_template(messages, task="emotion", with_text=with_text, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nName the emotion of the speaker from what you are given. Answer with one word: angry, "
        "disgust, fearful, happy, neutral, sad or surprise.<|im_end|>\n"
        f"<|im_start|>user\nvoice:\n{AUDIO}\nface:\n{VIDEO}\n"
        + ("sentence:\nold dog" if with_text else "")
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = processor.apply_chat_template(messages, task="emotion", **TENSORS)
    assert "memory_input_ids" not in batch and "pixel_values_videos" in batch and "input_features" in batch


@pytest.mark.parametrize("history", ["memory", "text"])
def test_memory_task_rebuilds_every_message(processor, history):
    options = dict(task="memory", history=history, add_generation_prompt=True)
    assert processor.apply_chat_template(HISTORY, **options) == (
        "<|im_start|>system\nEach memory vector holds one utterance. Write all utterances down again, in order, one a "
        f"line.<|im_end|>\n<|im_start|>user\nmemory:\n{MEMORY * 3}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert processor.apply_chat_template(HISTORY[1:2], **options) == (
        "<|im_start|>system\nThe memory vector holds one utterance. Write it down again.<|im_end|>\n"
        f"<|im_start|>user\nmemory:\n{MEMORY}<|im_end|>\n<|im_start|>assistant\n"
    )
    batch = processor.apply_chat_template(HISTORY, **{**TENSORS, **options})
    text = processor.memory_tokenizer.decode(batch["memory_input_ids"][0])
    assert text == "Clara: hello there<MEM>assistant: how are you<MEM>Clara: i am fine<MEM>"


def test_counter_prompt_holds_the_emotion_and_no_media(processor):
    messages = [*HISTORY, assistant("thanks"), user("old dog", sine(), grey(9, 99))]
    options = dict(task="counter", emotion="sad", add_generation_prompt=True)
    assert processor.apply_chat_template(messages, **options) == (
        "<|im_start|>system\nReply to the sentence, which was said with the given feeling. Give only the reply."
        f"<|im_end|>\n<|im_start|>user\nmemory:\n{MEMORY * 4}\nfeeling:\nsad\nsentence:\nold dog<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    batch = processor.apply_chat_template(messages, **{**TENSORS, **options})
    assert set(batch) == {"input_ids", "attention_mask", "memory_input_ids", "memory_attention_mask"}


def test_a_template_of_ones_own(processor):
    template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{{ num_memories }}"
    messages = [assistant("how are you"), user("fine <|im_end|>")]
    prompt = processor.apply_chat_template(messages, chat_template=template)
    assert prompt == "[assistant|how are you][user|fine <|im_end|>]1"
    sample = processor.prepare(messages, chat_template=template)
    assert processor.decode(sample["input_ids"]) == prompt
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") not in sample["input_ids"]
    assert processor.apply_chat_template([user("old dog")], chat_template="emotion", with_text=True) == (
        processor.apply_chat_template([user("old dog")], task="emotion", with_text=True)
    )


def test_a_processor_that_came_without_its_other_templates(processor, monkeypatch):
    messages = [user("old dog")]
    prompt = processor.apply_chat_template(messages)
    monkeypatch.setattr(processor, "chat_template", processor.chat_template["default"])
    assert processor.apply_chat_template(messages) == prompt
    with pytest.raises(ValueError, match=r"no chat template for the task 'emotion', only default.*download the whole"):
        processor.apply_chat_template(messages, task="emotion")


def test_half_an_emoji_is_a_replacement_character(processor):
    cut, whole = "good \ud83d dog", "good \ufffd dog"
    for history in ("memory", "text"):
        found, wanted = (
            processor.prepare([user(text), user(text)], history=history)["input_ids"] for text in (cut, whole)
        )
        assert found == wanted
    assert processor.encode_utterance("ann", cut) == processor.encode_utterance("ann", whole)


def test_tokens_are_those_of_the_rendered_prompt(processor):
    messages = [*HISTORY, user("about the old dog", sine(), grey(9, 99))]
    batch = processor.apply_chat_template(messages, **TENSORS)
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert processor.decode(batch["input_ids"][0]) == prompt
    ids = batch["input_ids"][0].tolist()
    for token, count in ((processor.video_token, 4), (processor.audio_token, 4), (processor.memory_token, 3)):
        assert ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == count


# ----------------------------------------------------------------------------------------------------------- messages


def test_an_utterance_in_memory_carries_its_name_or_role(processor):
    messages = [user("hello", name="Clara"), assistant("fine", name=None), user("you"), user("thanks")]
    sample = processor.prepare(messages)
    assert processor.memory_tokenizer.decode(sample["memory_input_ids"]) == (
        "Clara: hello<MEM>assistant: fine<MEM>user: you<MEM>"
    )
    pairs = (("Clara", "hello"), ("assistant", "fine"), ("user", "you"))
    assert sample["memory_input_ids"] == [i for pair in pairs for i in processor.encode_utterance(*pair)]


def test_content_as_a_string_is_one_text_item(processor):
    plain = [{"role": "user", "content": "hello"}, assistant("fine"), {"role": "user", "content": "thanks"}]
    parts = [user("hello"), {"role": "assistant", "content": [{"type": "text", "text": "fine"}]}, user("thanks")]
    for history in ("memory", "text"):
        one, two = processor.prepare(plain, history=history), processor.prepare(parts, history=history)
        assert one == two
    several = {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]}
    assert "sentence:\nhello\nthere<|im_end|>" in processor.apply_chat_template([several])


def test_keys_whose_value_is_none_are_absent(processor, clip):
    def arrow(item):
        return {key: item.get(key) for key in ("type", "text", "path", "bytes", "audio", "video", "sampling_rate")}

    clean = [user("hello"), user("thanks", {"path": clip}, {"path": clip})]
    filled = [{**m, "name": None, "content": [arrow(item) for item in m["content"]]} for m in clean]
    one, two = processor.apply_chat_template(clean, **TENSORS), processor.apply_chat_template(filled, **TENSORS)
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_the_callers_messages_are_not_changed(processor, clip):
    messages = [{"role": "system", "content": "be kind"}, *HISTORY, user("thanks", {"path": clip}, {"path": clip})]
    before = copy.deepcopy(messages)
    for task, history, tokenize in itertools.product(("dialogue", "emotion", "memory"), ("memory", "text"), (0, 1)):
        processor.apply_chat_template(messages, task=task, history=history, tokenize=tokenize, return_dict=True)
    assert messages == before


def test_media_of_earlier_messages_is_not_even_opened(processor):
    broken = {"path": "/no/such/file.mp4"}
    batch = processor.apply_chat_template([user("hello", broken, broken), user("thanks")], **TENSORS)
    assert set(batch) == {"input_ids", "attention_mask", "memory_input_ids", "memory_attention_mask"}
    assert processor.memory_tokenizer.decode(batch["memory_input_ids"][0]) == "user: hello<MEM>"


BAD_MESSAGES = {
    "last is not the user's": ([user("hello"), assistant("fine")], r"last message is of the role assistant"),
    "only a system message": ([{"role": "system", "content": "hello"}], r"last message is of the role system"),
    "unknown role": ([{"role": "bot", "content": "hi"}], r"message 0 has the role 'bot'.*system, user, assistant"),
    "no role": ([{"content": "hi"}], r"message 0 has the role None"),
    "system in the middle": ([user("a"), {"role": "system", "content": "b"}, user("c")], r"message 1 is a system"),
    "unknown content type": (
        [user("a"), {"role": "user", "content": [{"type": "image", "path": "x.png"}]}],
        r"message 1 .*'image'.*text, audio or video",
    ),
    "content item is a string": ([{"role": "user", "content": ["hi"]}], r"message 0 .*'hi'"),
    "no content": ([{"role": "user"}], r"message 0 has the content None"),
    "content is a number": ([{"role": "user", "content": 3}], r"message 0 has the content 3"),
    "text is no string": ([{"role": "user", "content": [{"type": "text", "text": None}]}], r"message 0 .*None"),
    "two videos": ([{"role": "user", "content": [{"type": "video", "path": "a"}] * 2}], r"message 0 has two video"),
    "two sounds": ([{"role": "user", "content": [{"type": "audio", "path": "a"}] * 2}], r"message 0 has two audio"),
    "empty message": ([user("")], r"last message is empty"),
    "no items": ([user("hello"), user()], r"last message is empty"),
    "no messages": ([], r"list of messages"),
    "a string": ("hello", r"list of messages"),
    "messages are strings": (["hello"], r"message 0 is 'hello'"),
}


@pytest.mark.parametrize("messages, error", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
@pytest.mark.parametrize("tokenize", [False, True])
def test_what_the_model_cannot_answer_is_an_error_that_names_the_message(processor, messages, error, tokenize):
    with pytest.raises(ValueError, match=error):
        processor.apply_chat_template(messages, tokenize=tokenize, return_dict=True)


def test_unknown_options_are_errors(processor):
    messages = [user("hello")]
    with pytest.raises(ValueError, match=r"Unknown task 'chat'.*dialogue, emotion, memory, counter"):
        processor.apply_chat_template(messages, task="chat")
    with pytest.raises(ValueError, match=r"Unknown history 'none'.*'memory' or 'text'"):
        processor.apply_chat_template(messages, history="none")
    for emotion in ("calm", None, "Sad"):
        with pytest.raises(ValueError, match=rf"emotion {emotion!r}.*{', '.join(EMOTIONS)}"):
            processor.apply_chat_template(messages, task="counter", emotion=emotion)
    with pytest.raises(ValueError, match=r"counter.*no text"):
        processor.apply_chat_template([user(None, sine())], task="counter", emotion="sad")
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np")
    with pytest.raises(ValueError, match=r"memory.*at least one utterance"):
        processor.apply_chat_template([{"role": "system", "content": "x"}], task="memory")
    with pytest.raises(ValueError, match="padding='max_length'"):
        processor.apply_chat_template(messages, tokenize=True, padding="max_length")
    with pytest.raises(ValueError, match="continue_final_message"):
        processor.apply_chat_template([*messages, assistant("fine")], continue_final_message=True)
    for keyword in ("tools", "documents", "num_frames", "truncation"):
        with pytest.raises(TypeError, match=keyword):
            processor.apply_chat_template(messages, **{keyword: None})
        with pytest.raises(TypeError, match=keyword):
            processor.apply_chat_template(messages, processor_kwargs={keyword: None})


# -------------------------------------------------------------------------------------------------------------- media


@pytest.mark.parametrize("layout, channels", [("mono", 1), ("stereo", 2), ("5.1", 6)])
def test_sound_of_any_channel_count(processor, write_media, tone, tmp_path, layout, channels):
    path = tmp_path / "sound.wav"
    write_media(path, samples=tone(1.0, 22050, channels=channels), sampling_rate=22050, layout=layout,
                audio_codec="pcm_s16le")  # fmt: skip
    features, mask = processor.sound({"type": "audio", "path": str(path)})
    assert features.shape == (80, 200) and mask.shape == (200,)
    assert 98 <= mask.sum() <= 101 and mask[: int(mask.sum())].all()  # one second of mel frames of 10 ms


@pytest.mark.parametrize(
    "seconds, windows, frames", [(0.005, 1, 1), (1.0, 1, 100), (2.0, 1, 200), (2.005, 2, 201), (5.0, 3, 500)]
)
def test_sound_goes_through_consecutive_windows(processor, seconds, windows, frames):
    item = sine(seconds)
    features, mask = processor.sound(item)
    assert features.shape == (80, 200 * windows)
    assert mask.tolist() == [1] * frames + [0] * (200 * windows - frames)
    for i in range(windows):  # each window equals the output of Whisper's extractor for that part of the sound
        part = item["audio"][32000 * i : 32000 * (i + 1)]
        alone = processor.feature_extractor(part, sampling_rate=16000, return_tensors="pt")["input_features"][0]
        assert torch.equal(features[:, 200 * i : 200 * (i + 1)], alone)


def test_sound_past_max_audio_seconds_is_cut(parts):
    processor = EmpathicProcessor.from_parts_pretrained(**parts, max_audio_seconds=2.5)
    features, mask = processor.sound(sine(10.0))
    assert features.shape == (80, 400) and mask.sum() == 250


def test_fewer_frames_than_asked_are_masked(processor):
    assert processor.num_frames == 2
    batch = processor.apply_chat_template([[user("hello", None, grey(50))], [user("hello", None, grey(1, 2, 3))]],
                                          **TENSORS)  # fmt: skip
    assert batch["pixel_values_videos"].shape == (2, 2, 3, 32, 32)
    assert batch["video_mask"].tolist() == [[1, 0], [1, 1]]
    assert (batch["pixel_values_videos"][0, 1] == 0).all() and (batch["pixel_values_videos"][0, 0] != 0).any()


def test_frames_are_even_at_inference_and_random_with_a_generator(processor):
    turn = [user("hello", None, grey(*range(0, 250, 5)))]

    def pixels(seed=None):
        generator = None if seed is None else np.random.default_rng(seed)
        return processor.prepare(turn, generator=generator)["video"][0]

    assert torch.equal(pixels(), pixels())
    assert torch.equal(pixels(3), pixels(3))
    assert len({tuple(pixels(seed).mean((1, 2, 3)).tolist()) for seed in range(8)}) > 4


def test_frames_are_what_the_image_processor_gives(processor):
    video = grey(10, 200)
    pixels, mask = processor.frames(video)
    expected = processor.image_processor(list(video["video"]), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected) and mask.tolist() == [1, 1]


def test_a_clip_is_read_from_its_path_or_its_bytes(processor, clip):
    with open(clip, "rb") as file:
        data = {"bytes": file.read()}
    one = processor.apply_chat_template([user("hello", {"path": clip}, {"path": clip})], **TENSORS)
    two = processor.apply_chat_template([user("hello", data, data)], **TENSORS)
    assert one["pixel_values_videos"].shape == (1, 2, 3, 32, 32) and one["input_features"].shape == (1, 80, 200)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_clip_that_cannot_be_read_is_named(processor, tmp_path, write_media, tone, grey_frames):
    silent, blind, empty = tmp_path / "silent.mp4", tmp_path / "blind.wav", tmp_path / "empty.mp4"
    write_media(silent, frames=grey_frames(4))
    write_media(blind, samples=tone(0.2), audio_codec="pcm_s16le")
    empty.write_bytes(b"")
    for turn, name in (
        (user("hello", {"path": str(silent)}), "silent.mp4"),
        (user("hello", None, {"path": str(blind)}), "blind.wav"),
        (user("hello", {"path": str(empty)}), "empty.mp4"),
        (user("hello", None, {"path": str(tmp_path / "none.mp4")}), "none.mp4"),
    ):
        with pytest.raises(MediaError, match=name):
            processor.apply_chat_template([turn], **TENSORS)


# ------------------------------------------------------------------------------------------------------------ batches

MIXTURES = list(itertools.product([0, 1], repeat=3))  # history, audio, video


def mixed(has_history, has_audio, has_video):
    turn = user("hello", sine() if has_audio else None, grey(9, 99) if has_video else None)
    return [*(HISTORY if has_history else []), turn]


@pytest.mark.parametrize("first, second", list(itertools.combinations(MIXTURES, 2)))
def test_any_two_mixtures_share_a_batch(processor, first, second):
    conversations = [mixed(*first), mixed(*second)]
    batch = processor.apply_chat_template(conversations, padding=True, **TENSORS)
    alone = [processor.apply_chat_template(c, **TENSORS) for c in conversations]
    assert set(batch) == set(alone[0]) | set(alone[1])
    length = batch["input_ids"].shape[1]
    for i, single in enumerate(alone):
        own = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][i, length - own :], single["input_ids"][0])
        assert batch["attention_mask"][i].tolist() == [0] * (length - own) + [1] * own
        for values, mask in (
            ("pixel_values_videos", "video_mask"),
            ("input_features", "input_features_mask"),
            ("memory_input_ids", "memory_attention_mask"),
        ):
            if values in single:
                size = single[mask].shape[1]
                assert torch.equal(batch[mask][i, :size], single[mask][0]) and not batch[mask][i, size:].any()
                if values == "memory_input_ids":
                    assert torch.equal(batch[values][i, :size], single[values][0])
                else:
                    assert torch.equal(batch[values][i], single[values][0])
            elif values in batch:
                assert not batch[mask][i].any()


def test_absent_modalities_as_zeros_under_a_zero_mask(processor):
    samples = [processor.prepare(mixed(0, 0, 0)), processor.prepare(mixed(0, 0, 0))]
    batch = processor.pad(samples, padding_side="right", all_modalities=True)
    shapes = {key: tuple(value.shape) for key, value in batch.items() if key not in ("input_ids", "attention_mask")}
    assert shapes == {
        "pixel_values_videos": (2, 2, 3, 32, 32),
        "video_mask": (2, 2),
        "input_features": (2, 80, 200),
        "input_features_mask": (2, 200),
        "memory_input_ids": (2, 1),
        "memory_attention_mask": (2, 1),
    }
    assert not any(batch[key].any() for key in ("video_mask", "input_features_mask", "memory_attention_mask"))
    assert not batch["pixel_values_videos"].any() and not batch["input_features"].any()
    assert set(processor.pad(samples, all_modalities=["memory"])) == {
        *("input_ids", "attention_mask", "memory_input_ids", "memory_attention_mask")
    }
    batch = processor.pad([processor.prepare(mixed(1, 1, 1)), samples[0]], all_modalities=True)
    assert batch["memory_attention_mask"].sum(1)[1] == 0 and batch["memory_attention_mask"].sum(1)[0] > 3
    assert batch["video_mask"].tolist() == [[1, 1], [0, 0]]


def test_sounds_of_different_length_are_padded_to_the_longest(processor):
    batch = processor.pad([processor.prepare([user("a", sine(s))]) for s in (0.5, 3.0)])
    assert batch["input_features"].shape == (2, 80, 400)
    assert batch["input_features_mask"].sum(1).tolist() == [50, 300]
    assert not batch["input_features"][0, :, 200:].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_padded_beside_the_ids(processor, side):
    samples = []
    for text, reply in (("hello", "fine"), ("how are you", "i am fine thanks")):
        sample, target = processor.prepare([user(text)]), processor.encode_reply(reply)
        sample["labels"] = [-100] * len(sample["input_ids"]) + target
        sample["input_ids"] = sample["input_ids"] + target
        samples.append(sample)
    batch = processor.pad(samples, padding_side=side)
    for row, sample in enumerate(samples):
        missing = batch["input_ids"].shape[1] - len(sample["labels"])
        pad = [-100] * missing
        assert batch["labels"][row].tolist() == (pad + sample["labels"] if side == "left" else sample["labels"] + pad)
        mask = [0] * missing + [1] * len(sample["labels"])
        assert batch["attention_mask"][row].tolist() == (mask if side == "left" else mask[::-1])
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.pad_token_id).all()


def test_an_empty_history_has_no_memory_keys(processor):
    batch = processor.apply_chat_template([user("hello")], **TENSORS)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert processor.prepare([user("hello")])["memory_input_ids"] == []


def test_padding_flat_or_in_processor_kwargs(processor):
    conversations = [mixed(1, 0, 0), mixed(0, 0, 0)]
    flat = processor.apply_chat_template(conversations, padding=True, **TENSORS)
    nested = processor.apply_chat_template(
        conversations, processor_kwargs={"padding": True, "return_tensors": "pt"}, **{**TENSORS, "return_tensors": None}
    )
    assert set(flat) == set(nested) and all(torch.equal(flat[key], nested[key]) for key in flat)
    with pytest.raises(ValueError, match="padding=True"):
        processor.apply_chat_template(conversations, padding=False, **TENSORS)
    with pytest.raises(ValueError, match="padding=True"):
        processor.apply_chat_template(conversations, processor_kwargs={"padding": False}, **TENSORS)
    single = processor.apply_chat_template(conversations[0], padding=False, **TENSORS)
    assert torch.equal(single["input_ids"][0], flat["input_ids"][0])


def test_what_comes_back(processor):
    messages = mixed(1, 0, 0)
    prompt = processor.apply_chat_template(messages)
    assert processor.apply_chat_template([messages, messages]) == [prompt, prompt]
    assert processor.apply_chat_template((tuple(messages), messages)) == [prompt, prompt]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == prompt + "<|im_start|>assistant\n"
    ids = processor.prepare(messages, add_generation_prompt=False)["input_ids"]
    assert processor.apply_chat_template(messages, tokenize=True) == ids
    assert processor.apply_chat_template([messages], tokenize=True, padding=True) == [ids]
    assert processor.apply_chat_template(messages, tokenize=True, return_tensors="pt").tolist() == [ids]
    lists = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert lists["input_ids"] == ids and lists["attention_mask"] == [1] * len(ids)
    moved = processor.apply_chat_template(mixed(1, 1, 1), **TENSORS).to("cpu", dtype=torch.bfloat16)
    assert moved["input_features"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.long


# ------------------------------------------------------------------------------------------------- saving and loading


def test_save_and_load_keep_everything(parts, tmp_path, clip):
    processor = EmpathicProcessor.from_parts_pretrained(
        **parts, num_query_tokens=3, num_frames=5, with_text=True, max_audio_seconds=7.5, audio_token="<|quad_start|>"
    )
    processor.chat_template["emotion"] = processor.chat_template["emotion"].replace("Name the emotion", "Say the mood")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "memory_tokenizer" / "tokenizer.json").is_file()
    assert (tmp_path / "tokenizer.json").is_file() and (tmp_path / "chat_template.jinja").is_file()
    names = {path.name for path in (tmp_path / "additional_chat_templates").iterdir()}
    assert names == {"counter.jinja", "emotion.jinja", "memory.jinja"}
    assert (tmp_path / "processing_empathic.py").is_file() and (tmp_path / "media_empathic.py").is_file()
    loaded = AutoProcessor.from_pretrained(tmp_path)  # the package is imported: no remote code is needed
    assert type(loaded) is EmpathicProcessor
    for key in ("num_query_tokens", "num_frames", "with_text", "max_audio_seconds", "chat_template", "mem_token_id",
                "video_token", "audio_token", "memory_token"):  # fmt: skip
        assert getattr(loaded, key) == getattr(processor, key), key
    assert loaded.memory_tokenizer.get_vocab() == processor.memory_tokenizer.get_vocab()
    assert loaded.feature_extractor.n_samples == 32000
    messages = [*HISTORY, user("<|im_end|><MEM>", {"path": clip}, {"path": clip})]
    for task in ("dialogue", "emotion", "memory", "counter"):
        one, two = (p.apply_chat_template(messages, task=task, emotion="sad", **TENSORS) for p in (processor, loaded))
        assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)


def test_copies_work_as_the_original(processor):
    """Data loaders pickle the processor, trainers copy it."""
    messages = [user("<MEM> hello"), user("<|im_end|>")]
    expected = processor.prepare(messages)
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert twin.prepare(messages) == expected


def test_a_memory_tokenizer_without_mem_is_an_error(processor):
    with pytest.raises(ValueError, match=r"memory tokenizer has no <MEM>.*add_special_tokens"):
        EmpathicProcessor(processor.image_processor, processor.feature_extractor, processor.tokenizer,
                          processor.tokenizer)  # fmt: skip


def test_from_parts_errors_name_the_missing_placeholder(parts):
    with pytest.raises(ValueError, match=r"video_token="):
        template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
        EmpathicProcessor.from_parts_pretrained(**{**parts, "text": parts["memory"]}, chat_template=template)


def test_transformers_interface(processor):
    assert processor.model_input_names[0] == "input_ids" and len(processor.model_input_names) == 11
    ids = processor(text=["hello there"], return_tensors="pt")["input_ids"]
    assert processor.batch_decode(ids) == ["hello there"]
    end = processor.tokenizer.eos_token_id
    assert processor.decode([*ids[0].tolist(), end], skip_special_tokens=True) == "hello there"


# ----------------------------------------------------------------------------------------- several vectors an utterance


def sized_copy(processor, memory_tokens, memory_rate=None):
    processor = copy.copy(processor)
    processor.memory_tokens, processor.memory_rate = memory_tokens, memory_rate
    return processor


@pytest.mark.parametrize(
    ("size", "counts"),
    [((1, None), (1, 1, 1)), ((2, None), (2, 2, 2)), ((1, 4), (1, 1, 2)), ((1, 3), (1, 2, 2)), ((2, 1), (3, 4, 5))],
)
def test_an_utterance_ends_with_a_mem_for_every_vector(processor, size, counts):
    plain, processor = processor, sized_copy(processor, *size)
    for text, count in zip(("hello", "hello there", "hello there you"), counts, strict=True):
        words = plain.encode_utterance("user", text)[:-1]
        assert len(words) == 2 + len(text.split())  # the name and its colon
        assert processor.encode_utterance("user", text) == [*words, *[processor.mem_token_id] * count]
        assert processor.count_memories("user", text) == count


def test_untrusted_text_adds_no_vector(processor):
    assert sized_copy(processor, 2).encode_utterance("<MEM>", "<MEM><MEM>").count(processor.mem_token_id) == 2


@pytest.mark.parametrize("task", ["dialogue", "memory"])
def test_a_prompt_has_a_placeholder_for_every_vector(processor, task):
    messages = [user("hello"), {"role": "assistant", "content": "i am fine thanks"}, user("how are you")]
    placeholder = processor.tokenizer.convert_tokens_to_ids(processor.memory_token)
    for tokens, rate in ((1, None), (2, None), (1, 4), (3, 2)):
        sized = sized_copy(processor, tokens, rate)
        prepared = sized.prepare(messages, task)
        remembered = messages if task == "memory" else messages[:-1]
        count = sum(sized.count_memories(m["role"], message_text(m)) for m in remembered)
        assert prepared["input_ids"].count(placeholder) == count >= tokens * len(remembered)
        assert prepared["memory_input_ids"].count(processor.mem_token_id) == count


def test_the_memory_prompt_does_not_call_several_vectors_one(processor):
    def system(count, *texts):
        prompt = sized_copy(processor, count).apply_chat_template([user(text) for text in texts], task="memory")
        return prompt.split("\n")[1]

    assert system(1, "hello").startswith("The memory vector holds one utterance. Write it down again.")
    assert system(1, "hello", "there").startswith("Each memory vector holds one utterance.")
    assert system(2, "hello").startswith("The memory holds one utterance. Write it down again.")
    assert system(2, "hello", "there").startswith("The memory holds utterances.")


def test_the_number_of_vectors_is_saved_and_an_older_processor_has_one(processor, tmp_path):
    sized_copy(processor, 2, 16).save_pretrained(tmp_path)
    loaded = EmpathicProcessor.from_pretrained(tmp_path)
    assert (loaded.memory_tokens, loaded.memory_rate) == (2, 16)
    file = tmp_path / "processor_config.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in saved.items() if not k.startswith("memory_")}), encoding="utf-8")
    loaded = EmpathicProcessor.from_pretrained(tmp_path)
    assert (loaded.memory_tokens, loaded.memory_rate) == (1, None)


@pytest.mark.parametrize(
    "size", [{"memory_tokens": 0}, {"memory_tokens": 1.5}, {"memory_rate": 0}, {"memory_rate": "x"}]
)
def test_an_impossible_number_of_vectors_is_an_error(parts, tiny_config, size):
    (name, value), *_ = size.items()
    for make in (lambda: EmpathicProcessor.from_parts_pretrained(**parts, **size), lambda: tiny_config(**size)):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; give a whole number from 1 up"):
            make()

"""Processor of the empathic model: turns conversations with media into tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # works without torchvision
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_format_empathic import CHATML, control_tokens, find_chat_format, find_end_of_turn, template_variables
from .configuration_empathic import (
    EMOTIONS,
    HUB_KEYS,
    MEM_TOKEN,
    EmpathicConfig,
    check_memory_size,
    find_placeholder_tokens,
)
from .media_empathic import load_audio, load_video, media_item

TASKS = ("dialogue", "emotion", "memory", "counter")
ROLES = ("system", "user", "assistant")
MODALITIES = ("video", "audio", "memory")

_MARKER = re.compile("\ue000(\\d+)\ue001")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair (a cut emoji), which tokenizers reject


def control_pattern(tokenizer) -> re.Pattern:
    """Return a pattern that matches the spelling of each control token of a tokenizer."""
    # Longest first, so that a token is not matched inside a longer token.
    tokens = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) matches nothing


def encode_untrusted(tokenizer, text: str, control: re.Pattern) -> list[int]:
    """
    Tokenize untrusted text, which can never produce a control token.

    The spelling of a control token is cut after its first character, and the pieces are tokenized separately, so that
    the spelling remains plain text.

    Args:
        control: `control_pattern(tokenizer)`.
    """
    text = _SURROGATE.sub("\ufffd", text)
    ids, start = [], 0
    while (match := control.search(text, start)) is not None:
        cut = match.start() + 1
        ids += tokenizer(text[start:cut], add_special_tokens=False)["input_ids"]
        start = cut
    return ids + tokenizer(text[start:], add_special_tokens=False)["input_ids"]


class UntrustedTexts:
    """
    Keeps untrusted texts out of a chat template, where they could become syntax or control tokens: the template gets
    markers of private-use characters instead, and the texts are tokenized separately.
    """

    def __init__(self):
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the marker of a text, for the template."""
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"

    def split(self, rendered: str) -> list[tuple[bool, str]]:
        """Return the rendered prompt as pieces (whether the piece is untrusted text, string), in order."""
        pieces = _MARKER.split(rendered)
        return [(i % 2 == 1, self.texts[int(p)] if i % 2 else p) for i, p in enumerate(pieces) if i % 2 or p]

    def has_all(self, rendered: str) -> bool:
        """Whether each text occurs exactly once in the rendered prompt, in the order of marking."""
        return [int(place) for place in _MARKER.findall(rendered)] == list(range(len(self.texts)))


def default_chat_templates(chat_format: str = CHATML) -> dict[str, str]:
    """
    Return the packaged Jinja templates, one per task; `default` is the dialogue (paper's Tables 4 to 7).

    Args:
        chat_format: the template that writes the messages for the language model, see `find_chat_format`.
    """
    folder = Path(__file__).parent / "chat_templates"
    templates = {task: (folder / f"{task}.jinja").read_text(encoding="utf-8") + chat_format for task in TASKS}
    templates["default"] = templates.pop("dialogue")
    return templates


def _pad(sequences: list[list[int]], value: int, side: str) -> torch.Tensor:
    length = max(len(sequence) for sequence in sequences)
    padding = [[value] * (length - len(sequence)) for sequence in sequences]
    pairs = zip(padding, sequences, strict=True)
    rows = [p + s if side == "left" else s + p for p, s in pairs]
    return torch.tensor(rows, dtype=torch.long).reshape(len(sequences), length)


def _stack_media(rows: list, shape: tuple[int, ...], length: int, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows, each (values, mask) or None, into zero-padded values (batch, *shape) and a mask (batch, length)."""
    dtype = next((row[0].dtype for row in rows if row is not None), torch.float32)
    values, mask = torch.zeros(len(rows), *shape, dtype=dtype), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        if row is not None:
            count = row[0].shape[axis]
            values[i].narrow(axis, 0, count).copy_(row[0])
            mask[i, :count] = row[1]
    return values, mask


def _stack_features(rows: list, size: tuple[int, ...] | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack cached features into (batch, positions, *size), zero-padded to at least `length` positions, and a mask."""
    there = [row for row in rows if row is not None]
    length = max([length, *(len(row) for row in there)])
    size = tuple(there[0].shape[1:]) if size is None else tuple(size)
    rows = [None if row is None else (row, torch.ones(len(row), dtype=torch.long)) for row in rows]
    return _stack_media(rows, (length, *size), length, 0)


class EmpathicProcessor(ProcessorMixin):
    r"""
    Turns conversations with audio and video into the inputs of [`EmpathicForConditionalGeneration`].

    Args:
        image_processor: CLIP's image processor, for the frames.
        feature_extractor: Whisper's feature extractor; its `chunk_length` is one Whisper window.
        tokenizer: the text LLM's tokenizer.
        memory_tokenizer: the memory encoder's tokenizer, which holds `<MEM>`.
        num_query_tokens (`int`): vectors per clip and modality, as in the model's config.
        num_frames (`int`): number of frames sampled from a video, evenly spaced, or at random in training.
        max_audio_seconds (`float`): longer audio is truncated; audio is encoded in consecutive Whisper windows.
        with_text (`bool`): whether the prompt of the `emotion` task has the sentence (not in the paper's Table 4).
        memory_tokens (`int`): memory vectors of an utterance, as in the model's config.
        memory_rate (`int`, *optional*): one memory vector for every so many tokens of an utterance, as in the config.
        video_token, audio_token, memory_token (`str`): placeholder tokens of the text vocabulary.
        end_of_turn (`str`): the token that ends a reply; the tokenizer's EOS token by default.
        chat_template (`dict[str, str]`): one template per task; `default` is the dialogue. By default they write
            ChatML, or the tokenizer's own chat template if its vocabulary lacks ChatML's tokens.

    Raises:
        ValueError: if the memory tokenizer has no `<MEM>`, the text tokenizer no placeholder tokens, the text
            tokenizer knows no chat format, or `memory_tokens` or `memory_rate` is not a whole number from 1 up.
    """

    def __init__(
        self,
        image_processor=None,
        feature_extractor=None,
        tokenizer=None,
        memory_tokenizer=None,
        num_query_tokens: int = 32,
        num_frames: int = 8,
        max_audio_seconds: float = 120.0,
        with_text: bool = False,
        memory_tokens: int = 1,
        memory_rate: int | None = None,
        video_token: str | None = None,
        audio_token: str | None = None,
        memory_token: str | None = None,
        end_of_turn: str | None = None,
        chat_template: dict[str, str] | None = None,
    ):
        if MEM_TOKEN not in memory_tokenizer.get_vocab():
            raise ValueError(
                f"The memory tokenizer has no {MEM_TOKEN}. Add it with `memory_tokenizer.add_special_tokens("
                f'{{"additional_special_tokens": ["{MEM_TOKEN}"]}})`, or use `from_parts_pretrained`.'
            )
        tokens = find_placeholder_tokens(tokenizer, video=video_token, audio=audio_token, memory=memory_token)
        self.video_token, self.audio_token, self.memory_token = (tokens[k] for k in ("video", "audio", "memory"))
        self.num_query_tokens = num_query_tokens
        self.num_frames = num_frames
        self.max_audio_seconds = max_audio_seconds
        self.with_text = with_text
        check_memory_size(memory_tokens, memory_rate)
        self.memory_tokens, self.memory_rate = memory_tokens, memory_rate
        if chat_template is None:
            chat_format = find_chat_format(tokenizer)
            chat_template = default_chat_templates(chat_format)
            end_of_turn = end_of_turn or find_end_of_turn(tokenizer, chat_format)
        self.end_of_turn = tokenizer.eos_token if end_of_turn is None else end_of_turn
        super().__init__(
            image_processor,
            feature_extractor,
            tokenizer,
            memory_tokenizer,
            chat_template=chat_template,
        )
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(self.end_of_turn)
        self.mem_token_id = memory_tokenizer.convert_tokens_to_ids(MEM_TOKEN)
        self._control = control_pattern(tokenizer)
        self._memory_control = control_pattern(memory_tokenizer)

    @classmethod
    def from_parts_pretrained(
        cls, text, vision, audio, memory, chat_template: str | None = None, **kwargs
    ) -> "EmpathicProcessor":
        """
        Compose a processor from the preprocessors of the model's four parts.

        Args:
            text, vision, audio, memory (`str`): Hub ids or folders of the LLM, CLIP, Whisper and Mamba.
            chat_template (`str`, *optional*): the language model's chat template (Jinja), from which the templates of
                all tasks are made; needed if its tokenizer has none and does not know ChatML.
            kwargs: arguments of the constructor, and options for the download from the Hub (`HUB_KEYS`), such as
                `token`.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        memory_tokenizer = AutoTokenizer.from_pretrained(memory, **hub)
        if MEM_TOKEN not in memory_tokenizer.get_vocab():
            memory_tokenizer.add_special_tokens({"additional_special_tokens": [MEM_TOKEN]})
        tokenizer = AutoTokenizer.from_pretrained(text, **hub)
        chat_format = find_chat_format(tokenizer, chat_template)
        kwargs.setdefault("end_of_turn", find_end_of_turn(tokenizer, chat_format))
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(vision, backend="pil", **hub),
            feature_extractor=AutoFeatureExtractor.from_pretrained(audio, **hub),
            tokenizer=tokenizer,
            memory_tokenizer=memory_tokenizer,
            chat_template=default_chat_templates(chat_format),
            **kwargs,
        )

    @classmethod
    def _load_tokenizer_from_pretrained(cls, sub_processor_type, pretrained_model_name_or_path, subfolder="", **kwargs):
        """
        As in transformers, but the memory tokenizer is loaded without a model config. Its folder has none, and a
        snapshot that was downloaded as a whole does not say so, which is an error offline. There is no fallback to the
        other tokenizer.
        """
        if sub_processor_type == "memory_tokenizer":
            subfolder = f"{subfolder}/{sub_processor_type}" if subfolder else sub_processor_type
            kwargs["config"] = PreTrainedConfig()
            return AutoTokenizer.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return super()._load_tokenizer_from_pretrained(
            sub_processor_type, pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )

    # ------------------------------------------------------------------ text

    def encode_plain(self, text: str, tokenizer=None) -> list[int]:
        """
        Tokenize untrusted text, which can never produce a control token: see `encode_untrusted`.

        Args:
            text (`str`): text of a user or a corpus.
            tokenizer: `self.tokenizer` (default) or `self.memory_tokenizer`.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        control = self._memory_control if tokenizer is self.memory_tokenizer else self._control
        return encode_untrusted(tokenizer, text, control)

    def encode_utterance(self, name: str, text: str) -> list[int]:
        """
        Tokenize `{name}: {text}<MEM>` with the memory tokenizer (Sec. 3.2). With `memory_tokens` above 1 or a
        `memory_rate`, several `<MEM>` end the utterance, one for each of its memory vectors.
        """
        ids = self.encode_plain(f"{name}: {text}", self.memory_tokenizer)
        started = 0 if self.memory_rate is None else -(-len(ids) // self.memory_rate)
        return [*ids, *[self.mem_token_id] * max(self.memory_tokens, started)]

    def count_memories(self, name: str, text: str) -> int:
        """Return the number of memory vectors of an utterance; with a `memory_rate`, the utterance is tokenized."""
        if self.memory_rate is None:
            return self.memory_tokens
        return self.encode_utterance(name, text).count(self.mem_token_id)

    def encode_reply(self, text: str) -> list[int]:
        """Tokenize a reply as a training target: its token ids and the end-of-turn token."""
        return [*self.encode_plain(text), self.end_of_turn_id]

    # ------------------------------------------------------------------ messages

    @staticmethod
    def _read_message(index: int, message: dict) -> dict:
        """Normalize a message to {"role", "name", "text", "audio", "video"}; the caller's message is not changed."""
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {message!r}; a message is a dict with `role` and `content`.")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if role == "system" and index > 0:
            raise ValueError(f"{where} is a system message; only the first message may be a system message.")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{where} has the content {content!r}; give a string or a list of content items.")
        texts, media = [], {"audio": None, "video": None}
        for item in content:
            item = media_item(item) if isinstance(item, dict) else item
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text":
                if not isinstance(item.get("text"), str):
                    raise ValueError(f"{where} has a text item whose `text` is {item.get('text')!r}, not a string.")
                texts.append(item["text"])
            elif kind in media:
                if media[kind] is not None:
                    raise ValueError(f"{where} has two {kind} items; a turn has at most one clip of each kind.")
                media[kind] = item
            else:
                raise ValueError(f"{where} has the content item {item!r}; its type must be text, audio or video.")
        return {"role": role, "name": message.get("name") or role, "text": "\n".join(texts), **media}

    def _split(self, messages: list[dict], task: str) -> tuple[dict | None, list[dict], dict | None]:
        """Split messages into the system message, the history and the turn (None for the task `memory`)."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"The conversation is {messages!r}; give a non-empty list of messages.")
        read = [self._read_message(i, message) for i, message in enumerate(messages)]
        system = read.pop(0) if read[0]["role"] == "system" else None
        if task == "memory":
            if not read:
                raise ValueError("The task `memory` needs at least one utterance to rebuild.")
            return system, read, None
        if not read or read[-1]["role"] != "user":
            last = read[-1]["role"] if read else "system"
            raise ValueError(
                f"The last message is of the role {last}, but the model answers the user: end with a user message."
            )
        turn = read.pop()
        if not turn["text"] and turn["audio"] is None and turn["video"] is None:
            raise ValueError("The last message is empty: give text, audio or video.")
        return system, read, turn

    def _render(self, template: str, system, earlier, turn, recalled, **variables) -> list[tuple[bool, str]]:
        """Render the prompt as pieces (whether the piece is untrusted text, string)."""
        untrusted = UntrustedTexts()
        mark = untrusted.mark

        def line(message: dict) -> str:
            named = message["name"] not in ROLES
            return mark(f"{message['name']}: {message['text']}" if named else message["text"])

        messages = [] if system is None else [{"role": "system", "content": mark(system["text"])}]
        messages += [{"role": message["role"], "content": line(message)} for message in earlier]
        # A message is shown as the memory reads it; the lines follow the memory vectors in the template.
        variables["recalled"] = "\n".join(mark(f"{message['name']}: {message['text']}") for message in recalled)
        sentence = None
        if turn is not None:
            sentence = mark(turn["text"]) if turn["text"] else None
            messages.append({"role": "user", "content": sentence or ""})
        variables = {**template_variables(self.tokenizer), "enable_thinking": False, **variables}
        rendered, _ = render_jinja_template([messages], chat_template=template, sentence=sentence, **variables)
        if recalled and variables["recalled"] not in rendered[0]:
            raise ValueError(
                "The chat template has no slot `recalled` for earlier utterances. Use the task `dialogue`, and for a "
                "processor that was saved without the slot set `processor.chat_template = default_chat_templates("
                "find_chat_format(processor.tokenizer))`."
            )
        return untrusted.split(rendered[0])

    def _template(self, task: str, chat_template: str | None) -> str:
        # A string: the checkpoint was downloaded without the folder of the additional templates.
        templates = {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; the tasks are {', '.join(TASKS)}.")
        name = "default" if task == "dialogue" else task
        if name not in templates:
            raise ValueError(
                f"The processor has no chat template for the task {task!r}, only {', '.join(templates)}. Other "
                "templates are in the folder `additional_chat_templates` of a checkpoint: download the whole "
                "checkpoint (`hf download ID`)."
            )
        return templates[name]

    def _prompt(self, messages, task, history, emotion, with_text, add_generation_prompt, chat_template, recalled=()):
        if history not in ("memory", "text"):
            raise ValueError(f"Unknown history {history!r}; use 'memory' or 'text'.")
        if task == "counter" and emotion not in EMOTIONS:
            raise ValueError(f"The emotion {emotion!r} is not one of {', '.join(EMOTIONS)}.")
        template = self._template(task, chat_template)
        system, earlier, turn = self._split(messages, task)
        if task == "counter" and not turn["text"]:
            raise ValueError("The task `counter` answers a sentence, but the last message has no text. Add text to it.")
        if task == "emotion":
            earlier = []
        remembered = earlier if history == "memory" or task == "memory" else []
        memory_ids = [i for m in remembered for i in self.encode_utterance(m["name"], m["text"])]
        pieces = self._render(
            template,
            system,
            earlier,
            turn,
            [self._read_message(i, message) for i, message in enumerate(recalled)],
            history=history,
            num_memories=memory_ids.count(self.mem_token_id),
            num_utterances=len(remembered),
            memory_placeholder=self.memory_token,
            audio=turn is not None and turn["audio"] is not None and task != "counter",
            video=turn is not None and turn["video"] is not None and task != "counter",
            audio_placeholder=self.audio_token * self.num_query_tokens,
            video_placeholder=self.video_token * self.num_query_tokens,
            emotion=emotion,
            emotions=list(EMOTIONS),
            with_text=self.with_text if with_text is None else with_text,
            add_generation_prompt=add_generation_prompt,
        )
        return pieces, memory_ids, turn if task != "counter" else None

    # ------------------------------------------------------------------ tensors

    def frames(self, item: dict, generator: np.random.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute CLIP's pixel values (frames, 3, height, width) of a video item, and a mask (frames,) of ones."""
        pixels = self.pixels(load_video(item, self.num_frames, generator))
        return pixels, torch.ones(len(pixels), dtype=torch.long)

    def pixels(self, frames: np.ndarray) -> torch.Tensor:
        """Compute CLIP's pixel values (frames, 3, height, width) of decoded frames (frames, height, width, 3)."""
        # The format must be explicit: transformers would guess wrong for frames that are 1 or 3 pixels high.
        inputs = self.image_processor(list(frames), input_data_format="channels_last", return_tensors="pt")
        return inputs["pixel_values"]

    def sound(self, item: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compute Whisper's log-mel features (mel, time) of an audio item, padded to a whole number of windows, and the
        mask (time,) of the mel frames within the clip.
        """
        extractor = self.feature_extractor
        samples = load_audio(item, extractor.sampling_rate, self.max_audio_seconds)
        windows = [samples[i : i + extractor.n_samples] for i in range(0, max(len(samples), 1), extractor.n_samples)]
        with torch.autocast("cpu", enabled=False):  # otherwise the mel filters get a bfloat16 spectrum
            mel = extractor(windows, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]
        mask = torch.zeros(mel.shape[0] * mel.shape[2], dtype=torch.long)
        mask[: -(-len(samples) // extractor.hop_length)] = 1
        return mel.transpose(0, 1).flatten(1), mask

    def prepare(
        self,
        messages: list[dict],
        task: str = "dialogue",
        history: str = "memory",
        emotion: str | None = None,
        with_text: bool | None = None,
        generator: np.random.Generator | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        recalled: Sequence[dict] = (),
    ) -> dict:
        """
        Turn one conversation into model inputs, without padding. See `apply_chat_template` for the arguments. With a
        `generator`, frames are sampled at random as in training; without it they are evenly spaced.

        `recalled` are earlier messages that the prompt of a dialogue also shows as text, after the memory vectors.

        A content item may hold the tower's cached outputs instead of the clip: `features` (frames, patches, width) of a
        video or (positions, width) of an audio clip.

        Returns:
            `input_ids` and `memory_input_ids` (lists of int); `video` and `audio`, each None or (values, mask) as from
            `frames` and `sound`; `video_encoder_states` and `audio_encoder_states` of items with cached features.
        """
        pieces, memory_ids, turn = self._prompt(
            messages, task, history, emotion, with_text, add_generation_prompt, chat_template, recalled
        )
        input_ids = []
        for is_users, text in pieces:
            input_ids += (
                self.encode_plain(text)
                if is_users
                else self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
            )
        prepared = {
            "input_ids": input_ids,
            "memory_input_ids": memory_ids,
            "video": None,
            "audio": None,
        }
        for kind in ("video", "audio"):
            item = None if turn is None else turn[kind]
            if item is None:
                continue
            if item.get("features") is not None:
                prepared[f"{kind}_encoder_states"] = item["features"]
            else:
                prepared[kind] = self.frames(item, generator) if kind == "video" else self.sound(item)
        return prepared

    def pad(
        self,
        samples: list[dict],
        padding_side: str = "left",
        all_modalities: bool | Sequence[str] = False,
        feature_sizes: dict[str, tuple[int, ...]] | None = None,
    ) -> BatchFeature:
        """
        Pad the outputs of `prepare` to a batch. An optional key `labels` (list of int) is padded with -100.

        Args:
            samples: dicts returned by `prepare`.
            padding_side (`str`): padding side of the text: `left` for generation, `right` for training.
            all_modalities (`bool` or names): give absent modalities as zeros with a zero mask instead of leaving them
                out; or only those of the names `video`, `audio` and `memory`. Used in training: all processes of a
                sharded model must run the same modules.
            feature_sizes (`dict`): given if clips come as cached features in every batch: the sizes of the zeros for
                absent clips, `video` (patches, width) and `audio` (width,).

        Raises:
            ValueError: if some clips of a modality come as features and some do not.

        Returns:
            `input_ids`, `attention_mask` (batch, length) and, if present: `pixel_values_videos` (batch, frames, 3,
            height, width), `video_mask` (batch, frames), `input_features` (batch, mel, time), `input_features_mask`
            (batch, time), `memory_input_ids`, `memory_attention_mask` (batch, length), `labels`; for cached features
            `video_encoder_states` (batch, frames, patches, width), `video_mask` (batch, frames),
            `audio_encoder_states` (batch, positions, width), `audio_encoder_mask` (batch, positions).
        """
        ids = [sample["input_ids"] for sample in samples]
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        data = {
            "input_ids": _pad(ids, pad_id, padding_side),
            "attention_mask": _pad([[1] * len(row) for row in ids], 0, padding_side),
        }
        if "labels" in samples[0]:
            data["labels"] = _pad([sample["labels"] for sample in samples], -100, padding_side)
        videos, sounds = [s["video"] for s in samples], [s["audio"] for s in samples]
        always = MODALITIES if all_modalities is True else all_modalities or ()
        features = {}
        for kind, clips in (("video", videos), ("audio", sounds)):
            cached = [sample.get(f"{kind}_encoder_states") for sample in samples]
            if feature_sizes is not None or any(row is not None for row in cached):
                if any(clip is not None for clip in clips):
                    raise ValueError(f"Some {kind} clips of a batch are cached features, others are not; use one form.")
                features[kind] = cached
        sizes = feature_sizes or {}
        if "video" in features:
            if "video" in always or any(row is not None for row in features["video"]):
                data["video_encoder_states"], data["video_mask"] = _stack_features(
                    features["video"], sizes.get("video"), self.num_frames
                )
        elif "video" in always or any(v is not None for v in videos):
            shape = (self.num_frames, 3, *self._frame_size())
            data["pixel_values_videos"], data["video_mask"] = _stack_media(videos, shape, self.num_frames, 0)
        if "audio" in features:
            if "audio" in always or any(row is not None for row in features["audio"]):
                data["audio_encoder_states"], data["audio_encoder_mask"] = _stack_features(
                    features["audio"], sizes.get("audio"), 1
                )
        elif "audio" in always or any(a is not None for a in sounds):
            time = max([a[0].shape[1] for a in sounds if a is not None], default=self.feature_extractor.nb_max_frames)
            shape = (self.feature_extractor.feature_size, time)
            data["input_features"], data["input_features_mask"] = _stack_media(sounds, shape, time, 1)
        memories = [sample["memory_input_ids"] for sample in samples]
        if "memory" in always or any(memories):
            pad_id = self.memory_tokenizer.eos_token_id or 0
            data["memory_input_ids"] = _pad(memories, pad_id, "right")
            data["memory_attention_mask"] = _pad([[1] * len(row) for row in memories], 0, "right")
            if data["memory_input_ids"].shape[1] == 0:  # one masked position, so that the memory runs on every batch
                data["memory_input_ids"] = torch.full((len(samples), 1), pad_id)
                data["memory_attention_mask"] = torch.zeros(len(samples), 1, dtype=torch.long)
        return BatchFeature(data)

    def _frame_size(self) -> tuple[int, int]:
        size = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        return size["height"], size["width"]

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        padding: bool = True,
        task: str = "dialogue",
        history: str = "memory",
        emotion: str | None = None,
        with_text: bool | None = None,
        continue_final_message: bool = False,
        processor_kwargs: dict | None = None,
    ) -> str | list[str] | BatchFeature | torch.Tensor:
        """
        Render a conversation, or a list of conversations, as prompts or model inputs.

        The last user message is the turn. The earlier messages are the history, given as memory vectors; their media
        are ignored. A leading system message replaces the template's system prompt.

        Args:
            conversation: message lists as in transformers. A media item holds `path`, `bytes`, or decoded media:
                `audio` (float samples) with `sampling_rate`, or `video` (frames). `audio` and `video` may also be a
                path, as in conversations for Qwen's models.
            chat_template: a template, or the name of one of the processor's templates, instead of the task's template.
            add_generation_prompt: whether to open the assistant's turn.
            tokenize, return_dict, return_tensors ("pt" or None): as in transformers.
            padding (`bool` or `"longest"`): pad a batch on the left. Also accepted in `processor_kwargs`.
            task: `dialogue`, `emotion`, `memory` (rebuild all messages) or `counter` (needs `emotion`).
            history: `memory`, or `text` for the ablation: earlier messages as chat turns, no memory.
            with_text: whether the prompt of `emotion` has the sentence; the processor's `with_text` by default.
            continue_final_message: must be False (transformers' pipelines pass it): the model answers the user.

        Raises:
            TypeError: for an argument or a key of `processor_kwargs` that is not listed here.
            ValueError: for a message list that the model cannot answer; the error names the message.
            MediaError: for a clip that cannot be read; the error names the file.
        """
        processor_kwargs = dict(processor_kwargs or {})
        padding = processor_kwargs.pop("padding", padding)
        return_tensors = processor_kwargs.pop("return_tensors", return_tensors)
        if processor_kwargs:
            raise TypeError(f"apply_chat_template() got unexpected processor_kwargs: {', '.join(processor_kwargs)}.")
        if padding not in (True, False, None, "longest"):
            raise ValueError(f"padding={padding!r} is not supported; use True ('longest') or False.")
        if continue_final_message:
            raise ValueError("continue_final_message is not supported: the model answers the user's last message.")
        sequence = (list, tuple)
        batched = isinstance(conversation, sequence) and bool(conversation) and isinstance(conversation[0], sequence)
        conversations = conversation if batched else [conversation]
        options = dict(task=task, history=history, emotion=emotion, with_text=with_text, chat_template=chat_template)
        if not tokenize:
            prompts = [
                "".join(text for _, text in self._prompt(c, add_generation_prompt=add_generation_prompt, **options)[0])
                for c in conversations
            ]
            return prompts if batched else prompts[0]
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; use 'pt'.")
        samples = [self.prepare(c, add_generation_prompt=add_generation_prompt, **options) for c in conversations]
        if not padding and len({len(sample["input_ids"]) for sample in samples}) > 1:
            raise ValueError("The conversations have prompts of different lengths: pass padding=True.")
        batch = self.pad(samples)
        if return_tensors is None:
            batch["input_ids"] = [sample["input_ids"] for sample in samples]
            batch["attention_mask"] = [[1] * len(sample["input_ids"]) for sample in samples]
            if not batched:
                batch["input_ids"], batch["attention_mask"] = batch["input_ids"][0], batch["attention_mask"][0]
        return batch if return_dict else batch["input_ids"]

    def __call__(self, text=None, **kwargs):
        """Tokenize trusted prompts. For conversations and untrusted text use `apply_chat_template`."""
        return self.tokenizer(text, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "pixel_values_videos",
            "video_encoder_states",
            "video_mask",
            "input_features",
            "input_features_mask",
            "audio_encoder_states",
            "audio_encoder_mask",
            "memory_input_ids",
            "memory_attention_mask",
        ]


EmpathicProcessor.register_for_auto_class()

# Only the package registers its classes, see configuration_empathic.py.
if __name__ == "empathic.processing_empathic":
    AutoProcessor.register(EmpathicConfig, EmpathicProcessor, exist_ok=True)

__all__ = ["EmpathicProcessor"]

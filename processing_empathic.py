"""Processor of the empathic model: a conversation with media -> tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_empathic import EMOTIONS, HUB_KEYS, MEM_TOKEN, EmpathicConfig, find_placeholder_tokens
from .media_empathic import load_audio, load_video

TASKS = ("dialogue", "emotion", "memory", "counter")
ROLES = ("system", "user", "assistant")

# A user's text is kept out of the template and of the tokenizer's control tokens: the template sees a marker made of
# private-use characters, and the text is tokenized by itself.
_MARKER = re.compile("\ue000(\\d+)\ue001")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of an emoji that was cut through: no tokenizer takes it


def default_chat_templates() -> dict[str, str]:
    """The packaged Jinja templates, one a task; `default` is the dialogue (paper's Tables 4 to 7)."""
    folder = Path(__file__).parent / "chat_templates"
    templates = {task: (folder / f"{task}.jinja").read_text(encoding="utf-8") for task in TASKS}
    templates["default"] = templates.pop("dialogue")
    return templates


def _pad(sequences: list[list[int]], value: int, side: str) -> torch.Tensor:
    length = max(len(sequence) for sequence in sequences)
    padding = [[value] * (length - len(sequence)) for sequence in sequences]
    pairs = zip(padding, sequences, strict=True)
    rows = [p + s if side == "left" else s + p for p, s in pairs]
    return torch.tensor(rows, dtype=torch.long).reshape(len(sequences), length)


def _stack_media(rows: list, shape: tuple[int, ...], length: int, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded values (batch, *shape) and their mask (batch, length); a row is (values, mask) or None."""
    dtype = next((row[0].dtype for row in rows if row is not None), torch.float32)
    values, mask = torch.zeros(len(rows), *shape, dtype=dtype), torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        if row is not None:
            count = row[0].shape[axis]
            values[i].narrow(axis, 0, count).copy_(row[0])
            mask[i, :count] = row[1]
    return values, mask


def _stack_features(rows: list, size: tuple[int, ...] | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cached features (batch, positions, *size), zero-padded to at least `length` positions, and their mask."""
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
        num_query_tokens (`int`): vectors of each modality, as in the model's config.
        num_frames (`int`): frames taken from a video, evenly spaced, or at random in training.
        max_audio_seconds (`float`): sound past this is cut; it goes through consecutive Whisper windows.
        with_text (`bool`): whether the `emotion` task shows the sentence (off in the paper's Table 4).
        video_token, audio_token, memory_token (`str`): placeholders of the text vocabulary.
        chat_template (`dict[str, str]`): a template a task; `default` is the dialogue.
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
        video_token: str | None = None,
        audio_token: str | None = None,
        memory_token: str | None = None,
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
        super().__init__(
            image_processor,
            feature_extractor,
            tokenizer,
            memory_tokenizer,
            chat_template=default_chat_templates() if chat_template is None else chat_template,
        )
        self.mem_token_id = memory_tokenizer.convert_tokens_to_ids(MEM_TOKEN)
        self._control = self._control_pattern(tokenizer)
        self._memory_control = self._control_pattern(memory_tokenizer)

    @classmethod
    def from_parts_pretrained(cls, text, vision, audio, memory, **kwargs) -> "EmpathicProcessor":
        """
        Composes a processor from the preprocessors of four Hub ids or folders, the same as the model's.

        Args:
            text, vision, audio, memory (`str`): ids or folders of the LLM, CLIP, Whisper and Mamba.
            kwargs: arguments of the constructor, and how to fetch files from the Hub (`HUB_KEYS`), such as `token`.
        """
        hub = {key: kwargs.pop(key) for key in HUB_KEYS if key in kwargs}
        memory_tokenizer = AutoTokenizer.from_pretrained(memory, **hub)
        if MEM_TOKEN not in memory_tokenizer.get_vocab():
            memory_tokenizer.add_special_tokens({"additional_special_tokens": [MEM_TOKEN]})
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(vision, backend="pil", **hub),
            feature_extractor=AutoFeatureExtractor.from_pretrained(audio, **hub),
            tokenizer=AutoTokenizer.from_pretrained(text, **hub),
            memory_tokenizer=memory_tokenizer,
            **kwargs,
        )

    # ------------------------------------------------------------------ text

    @staticmethod
    def _control_pattern(tokenizer) -> re.Pattern:
        # Longest first, so that no token hides in a longer one. Added runs of spaces (GPT-NeoX) control nothing.
        tokens = {t.content for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        tokens = sorted((t for t in tokens if t.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)))

    def encode_plain(self, text: str, tokenizer=None) -> list[int]:
        """
        Token ids of a text that nobody vouches for: it can never write a control token.

        A control token's spelling is cut after its first character, and the pieces are tokenized apart, so that it
        stays readable text.

        Args:
            text (`str`): the text, of a user or a corpus.
            tokenizer: `self.tokenizer` (default) or `self.memory_tokenizer`.
        """
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        text = _SURROGATE.sub("\ufffd", text)
        pattern = self._memory_control if tokenizer is self.memory_tokenizer else self._control
        ids, start = [], 0
        while (match := pattern.search(text, start)) is not None:
            cut = match.start() + 1
            ids += tokenizer(text[start:cut], add_special_tokens=False)["input_ids"]
            start = cut
        return ids + tokenizer(text[start:], add_special_tokens=False)["input_ids"]

    def encode_utterance(self, name: str, text: str) -> list[int]:
        """`{name}: {text}<MEM>` in the memory encoder's vocabulary (Sec. 3.2)."""
        return [*self.encode_plain(f"{name}: {text}", self.memory_tokenizer), self.mem_token_id]

    def encode_reply(self, text: str) -> list[int]:
        """A reply as training targets it: its token ids and the end of the turn."""
        return [*self.encode_plain(text), self.tokenizer.eos_token_id]

    # ------------------------------------------------------------------ messages

    @staticmethod
    def _read_message(index: int, message: dict) -> dict:
        """One message as {"role", "name", "text", "audio", "video"}; the caller's message is not changed."""
        where = f"message {index}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {message!r}; a message is a dict with `role` and `content`.")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}.")
        if role == "system" and index > 0:
            raise ValueError(f"{where} is a system message; only the first message may be one.")
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, (list, tuple)):
            raise ValueError(f"{where} has the content {content!r}; give a string or a list of content items.")
        texts, media = [], {"audio": None, "video": None}
        for item in content:
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
        """The system message, the history and the turn (None for task `memory`, which rebuilds all)."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"A conversation is a list of messages, got {messages!r}.")
        read = [self._read_message(i, message) for i, message in enumerate(messages)]
        system = read.pop(0) if read[0]["role"] == "system" else None
        if task == "memory":
            if not read:
                raise ValueError("The task `memory` needs at least one utterance to rebuild.")
            return system, read, None
        if not read or read[-1]["role"] != "user":
            last = read[-1]["role"] if read else "system"
            raise ValueError(f"The last message is the {last}'s, but the model answers the user: end with the user's.")
        turn = read.pop()
        if not turn["text"] and turn["audio"] is None and turn["video"] is None:
            raise ValueError("The last message is empty: give it a text, an audio or a video.")
        return system, read, turn

    def _render(self, template: str, system, earlier, turn, **variables) -> list[tuple[bool, str]]:
        """The prompt as (is the user's text, string) pieces."""
        texts: list[str] = []

        def mark(text: str) -> str:
            texts.append(text)
            return f"\ue000{len(texts) - 1}\ue001"

        def line(message: dict) -> str:
            named = message["name"] not in ROLES
            return mark(f"{message['name']}: {message['text']}" if named else message["text"])

        messages = [] if system is None else [{"role": "system", "content": mark(system["text"])}]
        messages += [{"role": message["role"], "content": line(message)} for message in earlier]
        sentence = None
        if turn is not None:
            sentence = mark(turn["text"]) if turn["text"] else None
            messages.append({"role": "user", "content": sentence or ""})
        rendered, _ = render_jinja_template([messages], chat_template=template, sentence=sentence, **variables)
        pieces = _MARKER.split(rendered[0])
        return [(i % 2 == 1, texts[int(p)] if i % 2 else p) for i, p in enumerate(pieces) if i % 2 or p]

    def _template(self, task: str, chat_template: str | None) -> str:
        # A string: a download that went without the folder of the others.
        templates = {"default": self.chat_template} if isinstance(self.chat_template, str) else self.chat_template
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        if task not in TASKS:
            raise ValueError(f"Unknown task {task!r}; the tasks are {', '.join(TASKS)}.")
        name = "default" if task == "dialogue" else task
        if name not in templates:
            raise ValueError(
                f"The processor has no chat template of the task {task!r}, only {', '.join(templates)}. The others are "
                "files in `additional_chat_templates` of a checkpoint: download the whole of it (`hf download ID`)."
            )
        return templates[name]

    def _prompt(self, messages, task, history, emotion, with_text, add_generation_prompt, chat_template):
        if history not in ("memory", "text"):
            raise ValueError(f"Unknown history {history!r}; it is 'memory' or 'text'.")
        if task == "counter" and emotion not in EMOTIONS:
            raise ValueError(f"The emotion {emotion!r} is not one of {', '.join(EMOTIONS)}.")
        template = self._template(task, chat_template)
        system, earlier, turn = self._split(messages, task)
        if task == "counter" and not turn["text"]:
            raise ValueError("The task `counter` answers a sentence, but the last message has no text.")
        if task == "emotion":
            earlier = []
        remembered = earlier if history == "memory" or task == "memory" else []
        pieces = self._render(
            template,
            system,
            earlier,
            turn,
            history=history,
            num_memories=len(remembered),
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
        return pieces, remembered, turn if task != "counter" else None

    # ------------------------------------------------------------------ tensors

    def frames(self, item: dict, generator: np.random.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's pixel values (frames, 3, height, width) of a video item and their mask (frames,) of ones."""
        pixels = self.pixels(load_video(item, self.num_frames, generator))
        return pixels, torch.ones(len(pixels), dtype=torch.long)

    def pixels(self, frames: np.ndarray) -> torch.Tensor:
        """CLIP's pixel values (frames, 3, height, width) of decoded frames (frames, height, width, 3)."""
        # Said, not guessed: a frame may be 1 or 3 pixels high.
        inputs = self.image_processor(list(frames), input_data_format="channels_last", return_tensors="pt")
        return inputs["pixel_values"]

    def sound(self, item: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Whisper's log-mel features (mel, time) of an audio item, `time` a whole number of windows, and the mask (time,)
        of the mel frames within the clip.
        """
        extractor = self.feature_extractor
        samples = load_audio(item, extractor.sampling_rate, self.max_audio_seconds)
        windows = [samples[i : i + extractor.n_samples] for i in range(0, max(len(samples), 1), extractor.n_samples)]
        with torch.autocast("cpu", enabled=False):  # the filters would meet a spectrum of bfloat16
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
    ) -> dict:
        """
        One conversation, unpadded. See `apply_chat_template` for the arguments; a `generator` samples frames at random
        as in training, without it they are evenly spaced.

        An item may hold what the model's tower gave for its clip before (a feature cache) instead of the clip:
        `features` (frames, patches, width) of a video, (positions, width) of an audio.

        Returns:
            `input_ids` and `memory_input_ids` (lists of int), `video` and `audio`: None or (values, mask), see
            `frames` and `sound`; `video_features` and `audio_features` where an item holds features.
        """
        pieces, remembered, turn = self._prompt(
            messages, task, history, emotion, with_text, add_generation_prompt, chat_template
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
            "memory_input_ids": [i for m in remembered for i in self.encode_utterance(m["name"], m["text"])],
            "video": None,
            "audio": None,
        }
        for kind in ("video", "audio"):
            item = None if turn is None else turn[kind]
            if item is None:
                continue
            if item.get("features") is not None:
                prepared[f"{kind}_features"] = item["features"]
            else:
                prepared[kind] = self.frames(item, generator) if kind == "video" else self.sound(item)
        return prepared

    def pad(
        self,
        samples: list[dict],
        padding_side: str = "left",
        all_modalities: bool = False,
        feature_sizes: dict[str, tuple[int, ...]] | None = None,
    ) -> BatchFeature:
        """
        Batches what `prepare` gave. An optional `labels` (list of int) beside `input_ids` is padded with -100.

        Args:
            samples: dicts of `prepare`.
            padding_side (`str`): of the text; `left` to generate, `right` to train.
            all_modalities (`bool`): gives absent modalities as zeros under a zero mask (training: all processes of a
                sharded model must run the same modules) instead of leaving them out.
            feature_sizes (`dict`): says that the clips of all batches come as cached features: `video` (patches,
                width) and `audio` (width,) of absent ones.

        Raises:
            ValueError: if one clip of a kind comes as features and another does not.

        Returns:
            `input_ids`, `attention_mask` (batch, length), and of those present: `pixel_values_videos` (batch, frames,
            3, height, width), `video_mask` (batch, frames), `input_features` (batch, mel, time),
            `input_features_mask` (batch, time), `memory_input_ids`, `memory_attention_mask` (batch, length), `labels`;
            of clips as features `video_features` (batch, frames, patches, width), `video_mask` (batch, frames),
            `audio_features` (batch, positions, width), `audio_features_mask` (batch, positions).
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
        features = {}
        for kind, clips in (("video", videos), ("audio", sounds)):
            cached = [sample.get(f"{kind}_features") for sample in samples]
            if feature_sizes is not None or any(row is not None for row in cached):
                if any(clip is not None for clip in clips):
                    raise ValueError(f"Some {kind} clips of a batch come as features and some do not; give one sort.")
                features[kind] = cached
        sizes = feature_sizes or {}
        if "video" in features:
            if all_modalities or any(row is not None for row in features["video"]):
                data["video_features"], data["video_mask"] = _stack_features(
                    features["video"], sizes.get("video"), self.num_frames
                )
        elif all_modalities or any(v is not None for v in videos):
            shape = (self.num_frames, 3, *self._frame_size())
            data["pixel_values_videos"], data["video_mask"] = _stack_media(videos, shape, self.num_frames, 0)
        if "audio" in features:
            if all_modalities or any(row is not None for row in features["audio"]):
                data["audio_features"], data["audio_features_mask"] = _stack_features(
                    features["audio"], sizes.get("audio"), 1
                )
        elif all_modalities or any(a is not None for a in sounds):
            time = max([a[0].shape[1] for a in sounds if a is not None], default=self.feature_extractor.nb_max_frames)
            shape = (self.feature_extractor.feature_size, time)
            data["input_features"], data["input_features_mask"] = _stack_media(sounds, shape, time, 1)
        memories = [sample["memory_input_ids"] for sample in samples]
        if all_modalities or any(memories):
            pad_id = self.memory_tokenizer.eos_token_id or 0
            data["memory_input_ids"] = _pad(memories, pad_id, "right")
            data["memory_attention_mask"] = _pad([[1] * len(row) for row in memories], 0, "right")
            if data["memory_input_ids"].shape[1] == 0:  # one masked position: modules run on every batch
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
        Renders one conversation, or a list of them, and turns it into the model's inputs.

        The last user message is the turn; the earlier ones are the history, one memory vector each; their media are
        ignored. A leading system message replaces the template's.

        Args:
            conversation: message lists of transformers. A media item holds `path`, `bytes`, or what is decoded already:
                `audio` (float samples) with `sampling_rate`, `video` (frames).
            chat_template: a template, or the name of one of the processor's, instead of the task's.
            add_generation_prompt: whether to open the assistant's turn.
            tokenize, return_dict, return_tensors ("pt" or None): as in transformers.
            padding (`bool` or `"longest"`): pads a batch on the left. May also stand in `processor_kwargs`.
            task: `dialogue`, `emotion`, `memory` (rebuild all messages) or `counter` (needs `emotion`).
            history: `memory`, or `text` for the ablation: earlier messages as chat turns, no memory.
            with_text: whether `emotion` shows the sentence; the processor's `with_text` by default.
            continue_final_message: only False, which transformers' pipelines pass: the model answers the user.

        Raises:
            TypeError: for an argument or a key of `processor_kwargs` that is not listed here.
            ValueError: for a message list the model cannot answer, naming the message.
            MediaError: for a clip that cannot be read, naming the file.
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
        """Tokenizes prompts that the caller vouches for; conversations with media go through `apply_chat_template`."""
        return self.tokenizer(text, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "pixel_values_videos",
            "video_features",
            "video_mask",
            "input_features",
            "input_features_mask",
            "audio_features",
            "audio_features_mask",
            "memory_input_ids",
            "memory_attention_mask",
        ]


EmpathicProcessor.register_for_auto_class()

# As in configuration_empathic.py.
if __name__ == "empathic.processing_empathic":
    AutoProcessor.register(EmpathicConfig, EmpathicProcessor, exist_ok=True)

__all__ = ["EmpathicProcessor"]

"""
Build the inputs of baselines (paper's Sec. 4.3): the conversation as chat turns in the model's own chat template, and
the clip of the last turn if the model has audio or video input.

| kind | models | clip |
|---|---|---|
| `chat` | any causal language model | no |
| `audio` | Qwen2-Audio | its audio |
| `video` | LLaVA-NeXT, LLaVA-NeXT-Video | 8 frames, as one video or as images |

All baselines, and the endpoints of `evaluation/systems`, get the same text. The same class builds the inputs for
fine-tuning (`baselines/train.py`) and for evaluation.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BatchFeature
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template

from ..data_prep.counter.generators import TRANSCRIPT
from ..data_prep.messages import clip_of, message_text
from ..media_empathic import MediaError, load_audio, load_video
from ..processing_empathic import ROLES
from ..thoughts import Written, ends_in_thought, read_written
from ..trainers.compat import sanitized

logger = logging.get_logger(__name__)

BASELINE_KINDS = ("chat", "audio", "video")
FRAMES_AS = ("video", "images")
# The prompt of chat_templates/dialogue.jinja, adapted for models without memory vectors; the same for all baselines.
SYSTEM_PROMPT = (
    "You take part in a conversation. Reply to what was said last, briefly, as people talk. Where the voice or the "
    "face of the last speaker is given, it shows how they feel. Give only the reply."
)


def chat_turns(messages: Sequence[dict], folded: bool = False) -> list[dict]:
    """
    Convert a conversation to alternating chat turns of plain text, with the instruction first and a user turn last.

    Consecutive user messages become one turn, one line per message. Users keep their names, as in the memory
    (`name: text`); assistant turns have no name, or models would write a name before each reply. Empty turns are left
    out.

    Args:
        messages: messages in the format of `DialogueSamples`; a leading system message replaces `SYSTEM_PROMPT`.
        folded: put the instruction into the first user turn, for templates without a system message.

    Raises:
        ValueError: if the conversation does not end with a user message.
    """
    instruction, messages = SYSTEM_PROMPT, list(messages)
    if messages and messages[0]["role"] == "system":
        instruction = message_text(messages.pop(0))
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("The conversation does not end with a user message; only a user message can be answered.")
    turns = [{"role": "user" if folded else "system", "content": instruction}]
    for place, message in enumerate(messages):
        role, text, name = message["role"], message_text(message), message.get("name")
        if not text and place < len(messages) - 1:
            continue
        if text and role == "user" and name and name not in ROLES:
            text = f"{name}: {text}"
        if turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n{text}" if text else ""
        else:
            turns.append({"role": role, "content": text})
    return turns


class BaselinePrompts:
    """
    Converts conversations to left-padded inputs of a baseline.

    Args:
        processor: the model's processor; for `chat` its tokenizer.
        kind: one of `BASELINE_KINDS`.
        longest: maximum number of tokens of prompt and reply; None for no limit. The oldest messages of a longer
            conversation are left out.
        num_frames: number of frames per clip.
        frames_as: `video` or `images`; None for a video if the processor has a video processor.

    Raises:
        ValueError: if the chat template drops a part of the conversation, or a model with a clip has no chat template.
    """

    def __init__(
        self, processor, kind: str, longest: int | None = None, num_frames: int = 8, frames_as: str | None = None
    ):
        if kind not in BASELINE_KINDS:
            raise ValueError(f"The kind is {kind!r}; it is one of {', '.join(BASELINE_KINDS)}.")
        if frames_as is not None and frames_as not in FRAMES_AS:
            raise ValueError(f"frames_as is {frames_as!r}; it is one of {', '.join(FRAMES_AS)}.")
        self.processor, self.kind, self.longest, self.num_frames = processor, kind, longest, num_frames
        self.tokenizer = processor if kind == "chat" else processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if frames_as is None:
            parts = processor.get_attributes() if kind == "video" else ()
            frames_as = "video" if "video_processor" in parts and processor.video_processor is not None else "images"
        self.frames_as = frames_as
        template = processor.chat_template
        self.is_transcript = template is None
        if template is None:
            if kind != "chat":
                raise ValueError("The processor has no chat template, which is needed to place the clip.")
            logger.warning("The model has no chat template: the conversation is given as a transcript to continue.")
            template = TRANSCRIPT
        self.template = template["default"] if isinstance(template, dict) else template
        self._learn_template()

    # ------------------------------------------------------------------ the template

    def _render(self, chat: list[dict], **options) -> str:
        if self.kind != "chat":
            chat = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]
        options = {**self.tokenizer.special_tokens_map, **options}
        return render_jinja_template([chat], chat_template=self.template, enable_thinking=False, **options)[0][0]

    def _learn_template(self) -> None:
        """Find out whether the template accepts a system message, and what it writes before and after a reply."""
        words = ("alpha", "bravo", "charlie")
        for self.folded in (False, True):
            roles = ("user" if self.folded else "system", "assistant", "user")
            probe = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
            try:
                prompt = self._render(probe, add_generation_prompt=True)
                if all(word in prompt for word in words):
                    break
            except TemplateError:
                pass
        else:
            raise ValueError("The chat template drops a part of the conversation, or cannot be rendered.")
        whole = self._render([*probe, {"role": "assistant", "content": "delta"}], add_generation_prompt=False)
        before, _, after = whole.rpartition("delta")
        self.starts_in_thought = ends_in_thought(prompt.rpartition(words[-1])[2])
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        # The template may add a newline, which the model does not write.
        self.ending = after.strip() or self.tokenizer.eos_token
        if self.is_transcript:
            self.lead, self.ending = " ", "\n"
        bos = self.tokenizer.bos_token
        adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        if adds_bos and self.kind != "chat" and not prompt.startswith(bos):
            # The template must write it: a tokenizer that adds it does not escape control tokens in untrusted text.
            self.template = "{{ bos_token }}" + self.template

    def reply_ids(self, text: str) -> list[int]:
        """The target tokens of a reply: its text, without control tokens, and the end of the turn."""
        ids = self.tokenizer(self.lead + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids + self.tokenizer(self.ending, add_special_tokens=False)["input_ids"]

    def read_written(self, text: str) -> Written:
        """The reply and the thoughts in the text that the model wrote; for a transcript only its first line."""
        if self.is_transcript:
            text = text.strip().split("\n")[0]
        return read_written(text, self.starts_in_thought)

    # ------------------------------------------------------------------ the clip

    def clip(self, messages: list[dict], generator: np.random.Generator | None = None) -> tuple[list[dict], str | None]:
        """The content items of the last turn's clip, decoded, and a note if it cannot be read."""
        item = None if self.kind == "chat" else clip_of(messages, self.kind)
        if item is None:
            return [], None
        try:
            if self.kind == "audio":
                rate = self.processor.feature_extractor.sampling_rate
                return [{"type": "audio", "audio": load_audio(item, rate)}], None
            frames = load_video(item, self.num_frames, generator)
        except MediaError as error:
            return [], f"The clip is left out: {error}"
        if self.frames_as == "video":  # a short clip has fewer frames, but a batch of videos is one array
            again = np.repeat(frames[-1:], self.num_frames - len(frames), axis=0)
            return [{"type": "video", "video": np.concatenate([frames, again])}], None
        return [{"type": "image", "image": Image.fromarray(frame)} for frame in frames], None

    # ------------------------------------------------------------------ tensors

    def encode(
        self,
        conversations: list[list[dict]],
        rooms: Sequence[int],
        generators: Sequence[np.random.Generator | None] | None = None,
    ) -> tuple[BatchFeature | None, list[int], list[str | None]]:
        """
        Encode a batch of conversations.

        Args:
            conversations: message lists, each ending with a user message.
            rooms: number of tokens to reserve for each reply.
            generators: random generators for the frames of each clip; evenly spaced frames if None.

        Returns:
            The inputs: `input_ids`, `attention_mask` (rows, length) and the processor's outputs for the clips, None
            without rows; the conversation index of each row (a conversation whose last turn alone is too long has no
            row); and for each conversation a note on what was left out, or None.
        """
        draws = [None] * len(conversations) if generators is None else generators
        clips, notes = zip(*map(self.clip, conversations, draws), strict=True)
        notes, dropped, rows = list(notes), [0] * len(conversations), list(range(len(conversations)))
        while rows:
            kept = [self._without_oldest(conversations[i], dropped[i]) for i in rows]
            turns = [chat_turns(messages, self.folded) for messages in kept]
            batch = self._apply([self._with_clip(t, clips[i]) for t, i in zip(turns, rows, strict=True)])
            if self.longest is None:
                break
            over = (batch["attention_mask"].sum(1) + torch.tensor([rooms[i] for i in rows]) - self.longest).tolist()
            if max(over) <= 0:
                break
            for row, messages, excess in zip(list(rows), kept, over, strict=True):
                if excess <= 0:
                    continue
                count = self._how_many(messages, excess)
                dropped[row] += count
                if not count:
                    rows.remove(row)
                    notes[row] = f"The last turn alone is {excess} tokens too long for the model."
        for row in rows:
            if dropped[row]:
                left_out = f"The {dropped[row]} oldest turns are left out: there is room for {self.longest} tokens."
                notes[row] = f"{left_out} {notes[row] or ''}".strip()
        return (batch if rows else None), rows, notes

    @staticmethod
    def _without_oldest(messages: list[dict], count: int) -> list[dict]:
        head = [message for message in messages[:1] if message["role"] == "system"]
        return head + messages[len(head) + count :]

    def _how_many(self, messages: list[dict], excess: int) -> int:
        """How many of the oldest messages to drop to save `excess` tokens; 0 if only the last message is left."""
        most = len(self._without_oldest(messages, 0)) - (messages[0]["role"] == "system") - 1

        def length(count: int) -> int:
            text = self._render(chat_turns(self._without_oldest(messages, count), self.folded))
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

        goal = length(0) - excess
        return min(most, bisect_left(range(most + 1), True, key=lambda count: length(count) <= goal))

    def _with_clip(self, turns: list[dict], items: list[dict]) -> list[dict]:
        if self.kind == "chat":
            return turns
        turns = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        turns[-1]["content"] = [*items, *turns[-1]["content"]]
        return turns

    def _apply(self, chats: list[list[dict]]) -> BatchFeature:
        # Untrusted text must not contain control tokens.
        templated = self.tokenizer if self.kind == "chat" else self.processor
        chats, sanitizing = sanitized(templated, chats)
        options = dict(
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **sanitizing,
        )
        if "enable_thinking" in self.template:  # before 5.23, a processor takes no variable that its template lacks
            options["enable_thinking"] = False
        if self.kind == "chat":
            batch = self.tokenizer.apply_chat_template(chats, padding=True, **options)
            return BatchFeature({name: batch[name] for name in ("input_ids", "attention_mask")})
        call = {"padding": True}
        if any(item["type"] == "video" for chat in chats for item in chat[-1]["content"]):
            call["do_sample_frames"] = False  # `load_video` has sampled them
        return self.processor.apply_chat_template(chats, processor_kwargs=call, **options)

"""
What a baseline reads (paper's Sec. 4.3): the conversation as chat turns in the model's own chat template, and of the
last turn, where the model has ears or eyes, the clip.

| kind | class of models | the clip |
|---|---|---|
| `chat` | any causal language model | no |
| `audio` | Qwen2-Audio | its sound |
| `video` | LLaVA-NeXT, LLaVA-NeXT-Video | 8 frames, as one video or as images |

All of them, and the endpoints of `evaluation/endpoint.py`, get the same words. The same class makes the prompts of
fine-tuning (`trainers/baseline.py`) and of the replies that are measured.
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

from empathic.data_prep.candidates import TRANSCRIPT, message_text
from empathic.media_empathic import MediaError, load_audio, load_video
from empathic.processing_empathic import ROLES

logger = logging.get_logger(__name__)

KINDS = ("chat", "audio", "video")
FRAMES_AS = ("video", "images")
# The words of chat_templates/dialogue.jinja for models that have no memory vectors; the same for all baselines.
SYSTEM_PROMPT = (
    "You take part in a conversation. Reply to what was said last, briefly, as people talk. Where the voice or the "
    "face of the last speaker is given, it shows how they feel. Give only the reply."
)


def chat_turns(messages: Sequence[dict], folded: bool = False) -> list[dict]:
    """
    A conversation as turns that alternate, each of one text, the instruction first and the user's last.

    What several users say in a row is one turn, a line each. Users keep their names, as the memory does (`name: text`);
    the assistant's turns have none, or models would write one before each reply. Turns without a text are left out.

    Args:
        messages: as `DialogueSamples` gives them; a leading system message replaces `SYSTEM_PROMPT`.
        folded: the instruction opens the first user's turn, for templates without a system message.

    Raises:
        ValueError: for a conversation that does not end with the user.
    """
    instruction, messages = SYSTEM_PROMPT, list(messages)
    if messages and messages[0]["role"] == "system":
        instruction = message_text(messages.pop(0))
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("The conversation does not end with the user's turn, and a reply answers the user.")
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


def clip_of(messages: Sequence[dict], kind: str) -> dict | None:
    """The `audio` or `video` item of the last message."""
    content = messages[-1]["content"]
    items = [] if isinstance(content, str) else [item for item in content if item["type"] == kind]
    return items[0] if items else None


class BaselinePrompts:
    """
    Conversations -> the inputs of a baseline, left-padded.

    Args:
        processor: the model's processor, or for `chat` its tokenizer.
        kind: one of `KINDS`.
        longest: tokens of prompt and reply that the model reads; None for no limit. The oldest messages of a longer
            conversation are left out.
        num_frames: of a clip.
        frames_as: `video` or `images`; None: a video if the processor has a part for it.

    Raises:
        ValueError: for a template that leaves out a part of the conversation, or none of a model with a clip.
    """

    def __init__(
        self, processor, kind: str, longest: int | None = None, num_frames: int = 8, frames_as: str | None = None
    ):
        if kind not in KINDS:
            raise ValueError(f"The kind is {kind!r}; it is one of {', '.join(KINDS)}.")
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
                raise ValueError("The processor has no chat template, and without one the clip has no place.")
            logger.warning("The model has no chat template: it is asked to go on with a transcript.")
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
        """Whether it takes a system message, and what stands before and after a reply."""
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
            raise ValueError("The chat template leaves out a part of the conversation, or cannot be rendered at all.")
        whole = self._render([*probe, {"role": "assistant", "content": "delta"}], add_generation_prompt=False)
        before, _, after = whole.rpartition("delta")
        self.lead = before[len(prompt) :] if before.startswith(prompt) else ""
        self.ending = after.strip() or self.tokenizer.eos_token  # a newline after it is the template's
        if self.is_transcript:
            self.lead, self.ending = " ", "\n"
        bos = self.tokenizer.bos_token
        adds_bos = bos is not None and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        if adds_bos and self.kind != "chat" and not prompt.startswith(bos):
            # Written by the template: a tokenizer that adds it itself does not keep control tokens of texts out.
            self.template = "{{ bos_token }}" + self.template

    def reply_ids(self, text: str) -> list[int]:
        """A reply as training targets it: its tokens, none of them a control token, and the end of the turn."""
        ids = self.tokenizer(self.lead + text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids + self.tokenizer(self.ending, add_special_tokens=False)["input_ids"]

    def read_reply(self, text: str) -> str:
        """What the model wrote, without what a transcript goes on with."""
        text = text.strip()
        return text.split("\n")[0].strip() if self.is_transcript else text

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
        Args:
            conversations: message lists, each ending with the user.
            rooms: tokens to keep free for each reply.
            generators: draw the frames of each; without them they are evenly spaced.

        Returns:
            `input_ids`, `attention_mask` (rows, length) and what the processor makes of the clips, None without rows;
            which conversations the rows are, all but those whose last turn alone is too long; a note for each
            conversation on what was left out, or None.
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
                    notes[row] = f"The last turn alone is {excess} tokens longer than the model reads."
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
        """How many of the oldest messages to leave out for a prompt shorter by `excess`; 0 if only the last is left."""
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
        options = dict(
            chat_template=self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # what people and corpora say never writes a control token
        )
        if self.kind == "chat":
            # `enable_thinking` is read by the templates of models that would think aloud.
            batch = self.tokenizer.apply_chat_template(chats, padding=True, enable_thinking=False, **options)
            return BatchFeature({name: batch[name] for name in ("input_ids", "attention_mask")})
        call = {"padding": True}
        if any(item["type"] == "video" for chat in chats for item in chat[-1]["content"]):
            call["do_sample_frames"] = False  # they are drawn already
        return self.processor.apply_chat_template(chats, processor_kwargs=call, **options)

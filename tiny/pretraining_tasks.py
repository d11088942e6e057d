"""Pretraining tasks of the tiny language model, in the exact format of the chat templates.

- `rebuild_one`, `rebuild_many`: write down the utterances that 1, or 2 to 5, vectors represent;
- `repeat`: repeat random words;
- `chat`, `chat_vectors`: give the next reply, with the history as chat turns or as vectors; no voice, no face;
- `counter`: reply to a sentence in the style of a given emotion;
- `emotion`: name the emotion of a sentence, or of vectors at the placeholders of the voice and of the face.
"""

import random
from functools import cache

from transformers.utils.chat_template_utils import render_jinja_template

from ..configuration_empathic import EMOTIONS, find_placeholder_tokens
from ..processing_empathic import default_chat_templates
from .dialogues import ASSISTANT, CONTENT_WORDS, USER, forget, grammar_words, reply_for

REPEAT_PROMPT = "Repeat the words."
MAX_UTTERANCES = 5  # maximum number of vectors in `rebuild_many`
RANDOM_SHARE = 0.2  # share of rebuilding samples with random words, which cannot be guessed without reading the vector
# Steps alternate between two mixtures, because many small groups of samples are slower than a few larger groups. The
# numbers are the shares of the tasks.
MIXTURES = (
    {"rebuild_one": 9, "chat": 4, "counter": 4, "emotion": 9},
    {"rebuild_many": 13, "repeat": 5, "chat_vectors": 6},
)
_MARK = "\ue000"


def prompt_texts():
    """Return all texts whose words must be single tokens: the grammar's words and every prompt."""
    texts = [*grammar_words(), REPEAT_PROMPT]
    for task in ("dialogue", "emotion", "memory", "counter"):
        for num_memories in (1, 2):
            texts += _pieces(task, None, True, num_memories, True, True, "happy", (), num_memories)
    return texts


def memory_line(turn):
    """Format a turn as in the memory and in the answers of the rebuilding tasks."""
    return f"{turn['speaker']}: {turn['text']}"


@cache
def _pieces(task, system, has_sentence, num_memories, audio, video, emotion, roles, num_utterances):
    """Render a prompt and split it where texts are inserted: the turns of the history, then the sentence."""
    template = default_chat_templates()["default" if task == "dialogue" else task]
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": role, "content": _MARK} for role in roles] + [{"role": "user", "content": _MARK}]
    rendered, _ = render_jinja_template(
        [messages],
        chat_template=template,
        sentence=_MARK if has_sentence and task != "memory" else None,
        history="text",
        num_memories=num_memories,
        num_utterances=num_utterances,
        memory_placeholder="<|memory|>",
        audio=audio,
        video=video,
        audio_placeholder="<|audio|>",
        video_placeholder="<|video|>",
        emotion=emotion,
        emotions=list(EMOTIONS),
        with_text=True,
        add_generation_prompt=True,
    )
    return tuple(rendered[0].split(_MARK))


class PromptWriter:
    """Converts prompts to token ids, equal to those from `EmpathicProcessor` for the same conversation.

    Args:
        tokenizer: result of `build_text_tokenizer`.
        num_query_tokens: number of vectors for the voice, and for the face.
    """

    def __init__(self, tokenizer, num_query_tokens=4):
        self.tokenizer = tokenizer
        self.tokens = find_placeholder_tokens(tokenizer)
        self.placeholder_ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in self.tokens.items()}
        self.num_query_tokens = num_query_tokens
        self._known = {}

    def encode(self, text):
        """Return the token ids of a text, a tuple."""
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def prompt(
        self,
        task,
        sentence=None,
        system=None,
        num_memories=0,
        audio=False,
        video=False,
        emotion=None,
        history=(),
        num_utterances=None,
    ):
        """Return the token ids of a prompt, a list.

        Args:
            task: `dialogue`, `emotion`, `memory` or `counter`.
            sentence: the last user sentence.
            system: a system message that replaces the template's.
            history: earlier turns as (role, text), rendered as chat turns.
            num_utterances: number of utterances of the memories, if some have several.
        """
        roles, count = tuple(role for role, _ in history), num_memories if num_utterances is None else num_utterances
        pieces = _pieces(task, system, sentence is not None, num_memories, audio, video, emotion, roles, count)
        texts = [text for _, text in history] + ([] if sentence is None else [sentence])
        ids = []
        for i, piece in enumerate(pieces):
            for name, count in (("memory", 1), ("audio", self.num_query_tokens), ("video", self.num_query_tokens)):
                piece = piece.replace(f"<|{name}|>", self.tokens[name] * count)
            ids += self.encode(piece)
            if i < len(texts):
                ids += self.encode(texts[i])
        return ids

    def answer(self, text):
        """Return the token ids of an answer with the end-of-turn token, a list."""
        return [*self.encode(text), self.tokenizer.eos_token_id]


class PretrainingTasks:
    """Draws samples of the tasks, each a dict of token ids:
    `prompt` and `answer` (lists), `utterances` (for each memory placeholder of the prompt the token before its words,
    or None, and a tuple of its words) and `cues` (for each voice or face placeholder the pair of emotion words that its
    vector represents).

    Args:
        writer: `PromptWriter`.
        dialogues: conversations from `make_dialogues`.
        seed: seed of the samples.
        most_vectors: maximum number of vectors for an utterance. Above 1, each utterance is divided into a random
            number of parts of about equal length, and each vector represents one.
    """

    def __init__(self, writer, dialogues, seed=0, most_vectors=1):
        self.writer = writer
        self.dialogues = dialogues
        self.most_vectors = most_vectors
        self.user_turns = [turn for dialogue in dialogues for turn in dialogue if turn["speaker"] != ASSISTANT]
        self.revealing = [turn for turn in self.user_turns if turn["reveals"]]
        self.words = grammar_words()
        self.content_words = sorted(CONTENT_WORDS)
        self.rng = random.Random(seed)
        self._tasks = {
            "rebuild_one": lambda: self._rebuild(1),
            "rebuild_many": lambda: self._rebuild(self.rng.randint(2, MAX_UTTERANCES)),
            "repeat": self._repeat,
            "chat": lambda: self._reply(as_vectors=False),
            "chat_vectors": lambda: self._reply(as_vectors=True),
            "counter": self._counter,
            "emotion": self._emotion,
        }

    def sample(self, task):
        """Draw a sample of a task of `MIXTURES`."""
        return self._tasks[task]()

    def batch(self, step, size):
        """Draw about `size` samples for a step, as a list per task of the step's mixture."""
        mixture = MIXTURES[step % len(MIXTURES)]
        total = sum(mixture.values())
        return [
            [self.sample(task) for _ in range(max(1, round(share * size / total)))] for task, share in mixture.items()
        ]

    def _finish(self, prompt, answer, utterances=(), cues=()):
        return {
            "prompt": prompt,
            "answer": self.writer.answer(answer),
            "utterances": list(utterances),
            "cues": list(cues),
        }

    def _parts(self, lines):
        """Divide each line among its vectors; see `utterances` of a sample."""
        found = []
        for line in lines:
            ids, before = self.writer.encode(line), None
            vectors = min(len(ids), self.rng.randint(1, self.most_vectors)) if self.most_vectors > 1 else 1
            size = -(-len(ids) // vectors)
            for start in range(0, len(ids), size):
                found.append((before, ids[start : start + size]))
                before = ids[start : start + size][-1]
        return found

    def _random_words(self, low, high):
        # Mostly content words, which the model must copy from the prompt; common words can be inferred.
        pool = self.content_words if self.rng.random() < 0.7 else self.words
        return " ".join(self.rng.choice(pool) for _ in range(self.rng.randint(low, high)))

    def _repeat(self):
        words = self._random_words(2, 9)
        return self._finish(self.writer.prompt("dialogue", words, system=REPEAT_PROMPT), words)

    def _rebuild(self, count):
        if self.rng.random() < RANDOM_SHARE:
            lines = [f"{self.rng.choice((USER, ASSISTANT))}: {self._random_words(2, 8)}" for _ in range(count)]
        else:
            dialogue = self.rng.choice(self.dialogues)
            count = min(count, len(dialogue))
            start = self.rng.randint(0, len(dialogue) - count)
            lines = [memory_line(turn) for turn in dialogue[start : start + count]]
        parts = self._parts(lines)
        prompt = self.writer.prompt("memory", num_memories=len(parts), num_utterances=len(lines))
        return self._finish(prompt, "\n".join(lines), parts)

    def _reply(self, as_vectors):
        dialogue = self.rng.choice(self.dialogues)
        k = self.rng.choice([i for i, turn in enumerate(dialogue) if turn["speaker"] == ASSISTANT])
        earlier, sentence, reply = dialogue[: k - 1], dialogue[k - 1]["text"], dialogue[k]["text"]
        if as_vectors:
            parts = self._parts([memory_line(turn) for turn in earlier])
            prompt = self.writer.prompt("dialogue", sentence, num_memories=len(parts), num_utterances=len(earlier))
            return self._finish(prompt, reply, parts)
        history = [("assistant" if turn["speaker"] == ASSISTANT else "user", turn["text"]) for turn in earlier]
        return self._finish(self.writer.prompt("dialogue", sentence, history=history), reply)

    def _counter(self):
        turn, emotion = self.rng.choice(self.user_turns), self.rng.choice(EMOTIONS)
        prompt = self.writer.prompt("counter", turn["text"], emotion=emotion)
        return self._finish(prompt, reply_for(forget(turn["context"]), emotion, self.rng))

    def _emotion(self):
        kinds = self.rng.choice(
            (("text",),) * 4 + (("audio",), ("video",), ("audio", "video"), ("audio", "video", "text"))
        )
        turn = self.rng.choice(self.revealing if kinds == ("text",) else self.user_turns)
        # Each modality allows up to two emotions; the answer is the emotion that both allow.
        others = self.rng.sample([emotion for emotion in EMOTIONS if emotion != turn["emotion"]], 2)
        cues = []
        for kind, other in zip(("audio", "video"), others, strict=True):
            if kind in kinds:
                names = (turn["emotion"], other if self.rng.random() < 0.5 else turn["emotion"])
                cues += [[self.writer.encode(name)[0] for name in names]] * self.writer.num_query_tokens
        prompt = self.writer.prompt(
            "emotion", turn["text"] if "text" in kinds else None, audio="audio" in kinds, video="video" in kinds
        )
        return self._finish(prompt, turn["emotion"], cues=cues)

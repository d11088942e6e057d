"""Counter-emotional replies and the preference pairs made of them (paper's Sec. 3.3 and 8; Fig. 4 and 8, Table 7).

For each sample the same LLM that is to be trained answers the sentence once for each emotion, as if it had been said
with that feeling. The candidate whose emotion is least like the true reply's becomes the rejected reply, if its
similarity is below a threshold.
"""

import json
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, Value
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.utils import logging

from empathic.configuration_empathic import EMOTIONS
from empathic.data_prep.writer import card_header, publish_parquet
from empathic.evaluation.metrics import cosine

logger = logging.get_logger(__name__)

HISTORIES = ("memory", "text", "none")
IDS = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "emotion")
THRESHOLD = 0.1  # Sec. 8: "below 0.1"
FEW = 0.05  # a smaller share of pairs than this is said loudly
PROGRESS = "counter-emotional replies"
BATCHES_AT_ONCE = 4  # replies of so many batches are sorted by length together
ROWS_AT_ONCE = 100  # in a parquet row group


# ---------------------------------------------------------------------------------------------------- generation


class SeededSampler(LogitsProcessor):
    """
    Samples each row's next token with a random stream of its own, and leaves only that token possible.

    So a reply depends on its own seed, not on which other rows share its batch; `generate` then runs greedily.

    Args:
        seeds: one string a row.
        temperature, top_k, top_p: as in `generate`; 1, 0 and 1 change nothing.
    """

    def __init__(self, seeds: Sequence[str], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
        self.streams = [random.Random(seed) for seed in seeds]
        self.warpers = LogitsProcessorList()
        if temperature != 1.0:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (rows, vocabulary) -> 0 for the sampled token of each row, -inf elsewhere."""
        cumulative = self.warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        draws = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64)  # (rows, 1)
        # The first token whose share of the line from 0 to 1 reaches past the draw.
        chosen = torch.searchsorted(cumulative, draws.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


@contextmanager
def adapters_off(model) -> Iterator[None]:
    """The model without its adapters, be it a `PeftModel` or a model with adapters of its own; then as it was."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if isinstance(model, PeftModel):
            with model.disable_adapter():
                yield
        else:
            kinds = (BaseTunerLayer, ModulesToSaveWrapper)
            layers = [layer for layer in model.modules() if isinstance(layer, kinds) and not layer.disable_adapters]
            for layer in layers:
                layer.enable_adapters(False)
            try:
                yield
            finally:
                for layer in layers:
                    layer.enable_adapters(True)
    finally:
        for parameter, needed in trained:  # switching adapters off and on changes these
            parameter.requires_grad_(needed)


def message_text(message: dict) -> str:
    """The text of a message, its content a string or a list of items."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(item["text"] for item in content or [] if item.get("type") == "text" and item.get("text"))


def _prompts(processor, messages: list[dict], emotions: Sequence[str], history: str, seed: str) -> list[dict]:
    """
    The prompt of each emotion: `emotion`, `seed` and `inputs`, which is what `processor.prepare` gives. ValueError if
    the conversation cannot be answered.
    """
    if history not in HISTORIES:
        raise ValueError(f"The history is {history!r}; it is one of {', '.join(HISTORIES)}.")
    # A system message of the dialogue would take the place of the task's own instruction.
    conversation = [message for message in messages if message.get("role") != "system"]
    if conversation and not message_text(conversation[-1]).strip():
        raise ValueError("the last message has no text, and a counter-emotional reply is an answer to the text")
    if history == "none":
        conversation, history = conversation[-1:], "memory"
    return [
        {
            "emotion": emotion,
            "seed": f"{seed} {emotion}",
            "inputs": processor.prepare(conversation, "counter", history, emotion=emotion),
        }
        for emotion in emotions
    ]


def _sampling(model, options: dict) -> dict:
    """Takes `temperature`, `top_k` and `top_p` out of the options; the model's generation config has the defaults."""
    config = model.generation_config
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    defaults = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    settings = {}
    for name, value in neutral.items():
        chosen = (options.pop(name, None), defaults[name])
        settings[name] = next((setting for setting in chosen if setting is not None), value)
    return settings


def _generate(model, processor, prompts, batch_size, do_sample, use_adapter, options, bar) -> list[dict]:
    """`emotion`, `text` and `finished` of each of `_prompts`, in order. Those of like length share a batch."""
    options = {"max_new_tokens": 128, **options}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    sampling = _sampling(base, options)
    if options.get("num_return_sequences", 1) != 1 or (do_sample and options.get("num_beams", 1) != 1):
        raise ValueError("One reply is written for each emotion: no num_return_sequences, and beams only if greedy.")
    ends = options.get("eos_token_id", base.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    # The longest first: what does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]["inputs"]["input_ids"]), reverse=True)
    replies: list[dict] = [{}] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), nullcontext() if use_adapter else adapters_off(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = processor.pad([prompts[i]["inputs"] for i in rows]).to(base.device)
                if do_sample:
                    options["logits_processor"] = [SeededSampler([prompts[i]["seed"] for i in rows], **sampling)]
                output = base.generate(**batch, do_sample=False, **options)[:, batch["input_ids"].shape[1] :]
                texts = processor.tokenizer.batch_decode(output, skip_special_tokens=True)
                for i, text, ids in zip(rows, texts, output.tolist(), strict=True):
                    finished = not set(ends).isdisjoint(ids)
                    replies[i] = {"emotion": prompts[i]["emotion"], "text": text.strip(), "finished": finished}
                bar.update(len(rows))
    finally:
        model.train(was_training)
    return replies


def generate_candidates(
    model,
    processor,
    messages_list: Sequence[list[dict]],
    emotions: Sequence[str] = EMOTIONS,
    batch_size: int = 32,
    seed: int = 0,
    ids: Sequence[str] | None = None,
    do_sample: bool = True,
    use_adapter: bool = False,
    history: str = "memory",
    progress: bool = True,
    **generate_kwargs,
) -> list[list[dict]]:
    """
    One reply for each conversation and emotion, as if its last sentence had been said with that emotion (Table 7).

    The prompt is text only: clips in the messages are not looked at, a system message is left out.

    Args:
        model: an `EmpathicForConditionalGeneration`, with or without adapters, or a `PeftModel` of one.
        processor: its `EmpathicProcessor`.
        messages_list: conversations, the last message the user's.
        emotions: of the seven.
        batch_size: replies written at once. It changes no reply (but for roundings between almost equal tokens).
        seed: with a conversation's id and the emotion it decides what is sampled.
        ids: a name for each conversation; its place in the list by default.
        do_sample: samples; False takes the likeliest token each time.
        use_adapter: writes with the model's adapters. Off by default: the replies are the backbone's own (Sec. 3.3).
        history: `memory` or `text`, as for the processor, or `none`: the last sentence alone.
        progress: shows a bar.
        generate_kwargs: of `model.generate`; `max_new_tokens` is 128 by default, `temperature`, `top_k` and `top_p` are
            those of the model's generation config, and change nothing where that has none.

    Returns:
        for each conversation a list, in the order of `emotions`, of `emotion`, `text` (may be empty) and `finished`
        (False if it was cut off at its greatest length).

    Raises:
        ValueError: for a conversation that cannot be answered, naming its place.
    """
    names = [str(i) for i in range(len(messages_list))] if ids is None else list(ids)
    prompts = []
    for place, (name, messages) in enumerate(zip(names, messages_list, strict=True)):
        try:
            prompts += _prompts(processor, messages, emotions, history, f"{seed} {name}")
        except ValueError as error:
            raise ValueError(f"conversation {place}: {error}") from error
    with tqdm(total=len(prompts), desc=PROGRESS, disable=not progress) as bar:
        replies = _generate(model, processor, prompts, batch_size, do_sample, use_adapter, generate_kwargs, bar)
    return [replies[start : start + len(emotions)] for start in range(0, len(replies), len(emotions))]


# ----------------------------------------------------------------------------------------------------- selection


def _least_similar(similarities: np.ndarray, threshold: float) -> int | None:
    lowest = int(similarities.argmin())
    return lowest if similarities[lowest] < threshold else None


def select_rejected(
    reply: str, candidates: Sequence[str], features, threshold: float = THRESHOLD
) -> tuple[int | None, np.ndarray]:
    """
    The candidate whose emotion is least like the true reply's (Sec. 3.3), if that is strictly below the threshold
    (Sec. 8).

    Args:
        reply: the true reply.
        candidates: the others, none of them empty.
        features: an `EmotionFeatures`.
        threshold: of the cosine.

    Returns:
        (index of the candidate or None, similarities (candidates,)). The first of equals is taken.

    Example: similarities 0.4, -0.2, 0.05 with the threshold 0.1 give index 1; with -0.2 they give None.
    """
    vectors = features.encode([reply, *candidates])
    similarities = cosine(np.broadcast_to(vectors[0], vectors[1:].shape), vectors[1:])
    return _least_similar(similarities, threshold), similarities


def normalised(text: str) -> str:
    """The words of a text: case, punctuation, white space and the encoding of letters do not count."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _drop_reason(text: str, reply: str) -> str | None:
    if not normalised(text):
        return "empty"
    return "same as the true reply" if normalised(text) == normalised(reply) else None


# --------------------------------------------------------------------------------------------------------- pairs


@dataclass
class _Audit:
    """What becomes of the samples and of the candidates."""

    lowest: list[float] = field(default_factory=list)  # the lowest similarity of each sample that has one
    left_out: list[dict] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)
    distinct: list[int] = field(default_factory=list)  # different candidates of each sample
    written: int = 0
    unfinished: int = 0

    def report(self, rows: list[dict], settings: dict) -> dict:
        """The report of `build_pairs`; what is alarming is logged too."""
        passed = len(rows) / len(self.lowest) if self.lowest else None
        histogram = {emotion: 0 for emotion in settings["emotions"]}
        histogram.update(Counter(row["rejected_emotion"] for row in rows))
        warnings = []
        if passed is not None and passed < FEW:
            warnings.append(
                f"Only {len(rows)} of {len(self.lowest)} samples ({passed:.1%}) have a candidate below the threshold "
                f"{settings['threshold']} under {settings['features']}; their median lowest similarity is "
                f"{np.median(self.lowest):.3f}. Features of another pooling (`probabilities`) may lie further "
                "apart, or raise the threshold."
            )
        if self.unfinished > FEW * self.written:
            warnings.append(
                f"{self.unfinished} of {self.written} candidates were cut off before their end. Raise max_new_tokens."
            )
        distinct = float(np.mean(self.distinct)) if self.distinct else None
        if distinct is not None and distinct < 2 and len(settings["emotions"]) > 1:
            warnings.append(
                f"A sample has {distinct:.1f} different candidates of {len(settings['emotions'])} on average: the "
                "model does not heed the emotion that it is given."
            )
        for warning in warnings:
            logger.warning(warning)
        return {
            **settings,
            "pairs": len(rows),
            "passed_threshold": passed,
            "rejected_emotions": histogram,
            "lowest_similarity": {
                name: float(np.quantile(self.lowest, share)) if self.lowest else None
                for name, share in (("least", 0.0), ("median", 0.5), ("greatest", 1.0))
            },
            "candidates": {
                "written": self.written,
                "distinct": distinct,
                "dropped": dict(Counter(item["reason"] for item in self.dropped)),
                "unfinished": self.unfinished,
            },
            "warnings": warnings,
            "left_out": self.left_out,
            "dropped": self.dropped,
        }


def sample_name(sample: dict) -> str:
    """How the report calls a sample: corpus/split/dialogue/turn of the reply."""
    return "/".join(str(sample[key]) for key in ("corpus", "split", "dialogue_id", "turn"))


def _select(sample: dict, candidates: list[dict], features, threshold: float, audit: _Audit) -> dict | None:
    """The preference row of a sample, or None; the candidates get their similarities."""
    name, kept = sample_name(sample), []
    audit.distinct.append(len({normalised(candidate["text"]) for candidate in candidates}))
    for candidate in candidates:
        audit.written += 1
        audit.unfinished += not candidate.pop("finished")
        candidate["similarity"] = None
        reason = _drop_reason(candidate["text"], sample["reply"])
        if reason is None:
            kept.append(candidate)
        else:
            audit.dropped.append({"item": name, "emotion": candidate["emotion"], "reason": reason})
    if not kept:
        audit.left_out.append({"item": name, "reason": "every candidate is empty or the same as the true reply"})
        return None
    index, similarities = select_rejected(sample["reply"], [c["text"] for c in kept], features, threshold)
    for candidate, similarity in zip(kept, similarities, strict=True):
        candidate["similarity"] = float(similarity)
    audit.lowest.append(float(similarities.min()))
    if index is None:
        reason = f"no candidate is below the threshold {threshold}: the lowest similarity is {audit.lowest[-1]:.3f}"
        audit.left_out.append({"item": name, "reason": reason})
        return None
    return {
        **{key: sample[key] for key in IDS},
        "prompt": sample["prompt"],
        "chosen": [{"role": "assistant", "content": sample["reply"]}],
        "rejected": [{"role": "assistant", "content": kept[index]["text"]}],
        "rejected_emotion": kept[index]["emotion"],
        "similarity": kept[index]["similarity"],
        "candidates": candidates,
    }


class _Remembered:
    """Features of texts that were encoded together beforehand, in large batches."""

    def __init__(self, features, texts: Sequence[str]):
        texts = list(dict.fromkeys(texts))
        self.vectors = dict(zip(texts, features.encode(texts), strict=True)) if texts else {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.vectors[text] for text in texts])


def build_pairs(
    samples: Sequence[dict],
    model,
    processor,
    features,
    threshold: float = THRESHOLD,
    emotions: Sequence[str] = EMOTIONS,
    batch_size: int = 32,
    seed: int = 0,
    do_sample: bool = True,
    use_adapter: bool = False,
    history: str = "memory",
    progress: bool = True,
    **generate_kwargs,
) -> tuple[list[dict], dict]:
    """
    Preference rows in TRL's format: the true reply chosen, the least similar counter-emotional one rejected.

    Candidates that are empty, or have the words of the true reply, are dropped. A sample that cannot be used is
    reported and left out; none ends the run. What is sampled depends on the seed and the sample's ids alone, not on its
    place.

    Args:
        samples: such as `DialogueSamples`: `prompt` (messages), `reply`, `corpus`, `split`, `dialogue_id`, `turn`,
            `utterance_id` and `emotion` (of the sentence, may be None).
        features: an `EmotionFeatures`.
        threshold: a pair is kept if the rejected reply's similarity is strictly below.
        model, processor, emotions, batch_size, seed, do_sample, use_adapter, history, progress, generate_kwargs: see
            `generate_candidates`.

    Returns:
        (rows, report). A row has the sample's ids, `prompt` (the messages as given), `chosen` and `rejected` (one
        assistant message each), `rejected_emotion`, `similarity`, and all `candidates` as `emotion`, `text` and
        `similarity` (None if dropped). The report has the settings, counts, the share of samples that passed the
        threshold, the histogram of the chosen emotions, and all that was left out, and why.
    """
    emotions = list(dict.fromkeys(emotions))
    if not emotions or set(emotions) - set(EMOTIONS):
        raise ValueError(f"The emotions are {emotions}; take some of {', '.join(EMOTIONS)}.")
    if history not in HISTORIES:
        raise ValueError(f"The history is {history!r}; it is one of {', '.join(HISTORIES)}.")
    settings = {
        "features": features.description,
        "threshold": threshold,
        "emotions": emotions,
        "history": history,
        "adapters": "on" if use_adapter else "off",
        "seed": seed,
        "generation": {"do_sample": do_sample, **generate_kwargs},
        "samples": len(samples),
    }
    audit, rows = _Audit(), []
    at_once = max(1, BATCHES_AT_ONCE * batch_size // len(emotions))
    with tqdm(total=len(samples) * len(emotions), desc=PROGRESS, disable=not progress) as bar:
        for start in range(0, len(samples), at_once):
            group, prompts = [], []
            for place in range(start, min(start + at_once, len(samples))):
                sample = samples[place]
                try:
                    if not (sample["reply"] or "").strip():
                        raise ValueError("the true reply is empty")
                    name = f"{seed} {sample_name(sample)}"
                    prompts += _prompts(processor, sample["prompt"], emotions, history, name)
                    group.append(sample)
                except ValueError as error:
                    audit.left_out.append({"item": sample_name(sample), "reason": str(error)})
                    bar.update(len(emotions))
            replies = _generate(model, processor, prompts, batch_size, do_sample, use_adapter, generate_kwargs, bar)
            texts = [reply["text"] for reply in replies if reply["text"]] + [sample["reply"] for sample in group]
            remembered = _Remembered(features, texts)
            for number, sample in enumerate(group):
                candidates = replies[number * len(emotions) : (number + 1) * len(emotions)]
                row = _select(sample, candidates, remembered, threshold, audit)
                if row is not None:
                    rows.append(row)
    return rows, audit.report(rows, settings)


# ------------------------------------------------------------------------------------------------------- writing


def pair_features() -> Features:
    """The columns of the preference rows, for `datasets`. Keys that a content item lacks are null."""
    text = Value("string")
    item = {"type": text, "text": text, "path": text, "bytes": Value("binary")}
    reply = [{"role": text, "content": text}]
    return Features(
        {
            **{key: text for key in IDS},
            "turn": Value("int32"),
            "prompt": [{"role": text, "name": text, "content": [item]}],
            "chosen": reply,
            "rejected": reply,
            "rejected_emotion": text,
            "similarity": Value("float64"),
            "candidates": [{"emotion": text, "text": text, "similarity": Value("float64")}],
        }
    )


def _for_arrow(row: dict) -> dict:
    """The row with every message's content as a list of items. ValueError for media that no column can hold."""
    prompt = []
    for message in row["prompt"]:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        for item in content:
            extra = {key for key, value in item.items() if value is not None} - {"type", "text", "path", "bytes"}
            if extra:
                raise ValueError(
                    f"{sample_name(row)}: a {item['type']} item holds {', '.join(sorted(extra))}; a written pair can "
                    "keep media as `path` or `bytes` only."
                )
        prompt.append({**message, "content": list(content)})
    return {**row, "prompt": prompt}


def write_pairs(rows: dict[str, Sequence[dict]], reports: dict[str, dict], out: str | os.PathLike) -> None:
    """
    Writes OUT/data/{split}-00000-of-00001-{digest}.parquet, a card that names them, and report.json.

    `datasets.load_dataset(OUT)` reads it. Files of an earlier run are replaced once the new ones are whole. A split
    without rows has no file; if none has any, only report.json is written.

    Args:
        rows, reports: what `build_pairs` gave for each split.
        out: a folder; made if it is not there.

    Raises:
        ValueError: for a row whose media is neither a path nor bytes, naming its sample.
    """
    out = Path(out)
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    schema = pair_features().arrow_schema
    splits = [split for split, kept in rows.items() if kept]
    for split in splits:
        with pq.ParquetWriter(data / f"{split}.part", schema) as writer:
            for start in range(0, len(rows[split]), ROWS_AT_ONCE):
                group = [_for_arrow(row) for row in rows[split][start : start + ROWS_AT_ONCE]]
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
    names = publish_parquet(data, splits)
    if names:
        (out / "README.md").write_text(_card(reports, names), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(reports, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(reports: dict[str, dict], names: dict[str, str]) -> str:
    table = ""
    for split in names:
        report = reports[split]
        chosen = ", ".join(f"{emotion} {count}" for emotion, count in report["rejected_emotions"].items())
        columns = (split, report["samples"], report["pairs"], chosen, report["threshold"], report["features"])
        table += "| " + " | ".join(map(str, columns)) + " |\n"
    return f"""{card_header(names)}
# Counter-emotional preference pairs

For any preference trainer that reads `prompt`, `chosen` and `rejected`. Chosen is the true reply. Rejected is, of the
replies that the model wrote for each emotion, the one least like the true reply in emotion, if their cosine is below
the threshold.

| split | samples | pairs | emotions of the rejected replies | threshold | features |
|---|---|---|---|---|---|
{table}
`report.json` has all settings, and names what was left out, and why.
"""

"""Which candidate becomes the rejected reply, and the files of the preference pairs (paper's Sec. 3.3 and 8; Fig. 8).

Of the replies that were written for each emotion, the one whose emotion is least like the true reply's becomes the
rejected reply, if its similarity is below a threshold.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from empathic.data_prep.candidates import message_text
from empathic.evaluation.emotion_features import POOLINGS

IDS = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "emotion")
THRESHOLD = 0.1  # Sec. 8: "below 0.1"
NEAR = 0.9  # two replies that overlap at least so much count as one
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20  # a row group of the parquet files ends at either


def normalised(text: str) -> str:
    """The words of a text: case, punctuation, white space and the encoding of letters do not count."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def overlap(a: str, b: str) -> float:
    """
    How much two texts share: Dice's coefficient of the runs of three characters of their normalised forms, 0 to 1.

    Example: "I am sorry!" and "i am sorry" share all (1.0), "i am sorry" and "i am so sorry" 10 of 10 and 13 (0.87).
    """
    return _dice(_trigrams(normalised(a)), _trigrams(normalised(b)))


def _trigrams(text: str) -> Counter:
    padded = f" {text} " if text else ""
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))


def _dice(a: Counter, b: Counter) -> float:
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def drop_reasons(reply: str, candidates: Sequence[str], near: float = NEAR) -> list[str | None]:
    """
    Why a candidate cannot be the rejected reply: it is empty, or the same as the true reply or an earlier candidate, or
    overlaps one of these by `near` or more. None for those that can.

    Args:
        reply: the true reply.
        candidates: the others.
        near: see `overlap`; above 1 only equal words count.
    """
    words = normalised(reply)
    others, reasons = [("the true reply", words, _trigrams(words))], []
    for text in candidates:
        words = normalised(text)
        grams, reason = _trigrams(words), None if words else "empty"
        for name, other, other_grams in others:
            if reason is None and words == other:
                reason = f"same as {name}"
            elif reason is None and _dice(grams, other_grams) >= near:
                reason = f"near duplicate of {name}"
        if reason is None:
            others.append(("another candidate", words, grams))
        reasons.append(reason)
    return reasons


def select(candidates: Sequence[dict], pooling: str, threshold: float) -> tuple[int | None, float | None]:
    """
    The candidate whose emotion is least like the true reply's (Sec. 3.3), if that is strictly below the threshold
    (Sec. 8).

    Args:
        candidates: each with `dropped` and `similarities`, one of them `pooling`.

    Returns:
        (index of the candidate or None, the lowest similarity or None if all are dropped). Of equals the first.

    Example: similarities 0.4, -0.2, 0.05 with the threshold 0.1 give (1, -0.2); with -0.2 they give (None, -0.2).
    """
    kept = [(c["similarities"][pooling], i) for i, c in enumerate(candidates) if c["dropped"] is None]
    if not kept:
        return None, None
    lowest, index = min(kept)
    return (index if lowest < threshold else None), lowest


def sample_name(sample: dict) -> str:
    """How the report calls a sample: corpus/split/dialogue/turn of the reply."""
    return "/".join(str(sample[key]) for key in ("corpus", "split", "dialogue_id", "turn"))


def pair_features(plain_text: bool = False) -> Features:
    """
    The columns of the preference rows, for `datasets`. Keys that a content item lacks are null.

    Args:
        plain_text: the content of the prompt's messages is a string, not a list of items.
    """
    text = Value("string")
    item = {"type": text, "text": text, "path": text, "bytes": Value("binary")}
    reply = [{"role": text, "content": text}]
    candidate = {
        "emotion": text,
        "text": text,
        "finished": Value("bool"),
        "dropped": text,
        "similarity": Value("float64"),
        "similarities": {pooling: Value("float64") for pooling in POOLINGS},
    }
    return Features(
        {
            **{key: text for key in IDS},
            "turn": Value("int32"),
            "prompt": [{"role": text, "name": text, "content": text if plain_text else [item]}],
            "chosen": reply,
            "rejected": reply,
            "rejected_emotion": text,
            "similarity": Value("float64"),
            "candidates": [candidate],
        }
    )


def make_row(sample: dict, candidates: Sequence[dict], index: int, pooling: str, plain_text: bool = False) -> dict:
    """
    A preference row in TRL's format, for the columns of `pair_features`: the true reply chosen, candidate `index`
    rejected. With `plain_text` the prompt's clips are left out.

    Raises:
        ValueError: for media that is neither a path nor bytes, naming the sample.
    """
    rejected = candidates[index]
    return {
        **{key: sample[key] for key in IDS},
        "prompt": [_message(sample, message, plain_text) for message in sample["prompt"]],
        "chosen": [{"role": "assistant", "content": sample["reply"]}],
        "rejected": [{"role": "assistant", "content": rejected["text"]}],
        "rejected_emotion": rejected["emotion"],
        "similarity": rejected["similarities"][pooling],
        "candidates": [{**c, "similarity": c["similarities"][pooling]} for c in candidates],
    }


def _message(sample: dict, message: dict, plain_text: bool) -> dict:
    if plain_text:
        return {**message, "content": message_text(message)}
    content = message["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    for item in content:
        extra = {key for key, value in item.items() if value is not None} - {"type", "text", "path", "bytes"}
        if extra:
            raise ValueError(
                f"{sample_name(sample)}: a {item['type']} item holds {', '.join(sorted(extra))}; a written pair can "
                "keep media as `path` or `bytes` only."
            )
    return {**message, "content": list(content)}


class PairWriter:
    """
    Streams rows into one parquet file, made with the first row; a context manager.

    Args:
        path: the file.
        plain_text: see `pair_features`.
    """

    def __init__(self, path, plain_text: bool = False):
        self.path, self.schema = path, pair_features(plain_text).arrow_schema
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._group: list[dict] = []
        self._bytes = 0

    def write(self, row: dict) -> None:
        """Adds a row of `make_row`."""
        self.rows += 1
        self._group.append(row)
        contents = [message["content"] for message in row["prompt"]]
        items = [item for content in contents if not isinstance(content, str) for item in content]
        self._bytes += sum(len(item.get("bytes") or b"") for item in items)
        if len(self._group) >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._group:
            if self._writer is None:
                self._writer = pq.ParquetWriter(self.path, self.schema)
            self._writer.write_table(pa.Table.from_pylist(self._group, schema=self.schema))
            self._group, self._bytes = [], 0

    def __enter__(self) -> "PairWriter":
        return self

    def __exit__(self, *_) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

"""Select the rejected replies and write the preference pairs (paper's Sec. 3.3 and 8; Fig. 8).

Of the candidates, one per emotion, the candidate whose emotion is least similar to that of the true reply becomes the
rejected reply, if its similarity is below a threshold. On request, a row also keeps further candidates below the
threshold.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value

from ...evaluation.emotion_features import POOLINGS
from ..loading import NEGATIVES
from ..messages import message_text

PAIR_IDS = ("corpus", "split", "dialogue_id", "turn", "utterance_id", "emotion")
THRESHOLD = 0.1  # Sec. 8: "below 0.1"
NEAR = 0.9  # overlap at which two replies count as duplicates
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20  # a row group of the parquet files ends when it reaches either size


def normalised(text: str) -> str:
    """Normalize a text to its words, ignoring case, punctuation, whitespace and the Unicode form of letters."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def overlap(a: str, b: str) -> float:
    """
    Similarity of two texts: Dice's coefficient of the character trigrams of their normalized forms, 0 to 1.

    Example: "I am sorry!" and "i am sorry" share all trigrams (1.0); "i am sorry" and "i am so sorry" have 10 and 13
    trigrams, of which 10 are shared (0.87).
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
    Find the candidates that cannot be the rejected reply: a candidate is dropped if it is empty, or if it equals the
    true reply or an earlier kept candidate, or overlaps with them by `near` or more.

    Args:
        reply: the true reply.
        candidates: texts of the candidates.
        near: threshold for `overlap`; above 1, only texts with equal words are duplicates.

    Returns:
        The reason for each candidate, or None if it is kept.
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
    Select the candidate whose emotion is least similar to that of the true reply (Sec. 3.3), if the similarity is
    strictly below the threshold (Sec. 8).

    Args:
        candidates: candidates with `dropped` and `similarities` (pooling -> cosine).
        pooling: the pooling whose similarities are compared.
        threshold: the threshold.

    Returns:
        (index of the candidate or None, lowest similarity or None if all are dropped). In a tie, the first candidate.

    Example: similarities 0.4, -0.2, 0.05 give (1, -0.2) with threshold 0.1 and (None, -0.2) with threshold -0.2.
    """
    kept = [(c["similarities"][pooling], i) for i, c in enumerate(candidates) if c["dropped"] is None]
    if not kept:
        return None, None
    lowest, index = min(kept)
    return (index if lowest < threshold else None), lowest


def select_all(candidates: Sequence[dict], pooling: str, threshold: float, limit: int | None = None) -> list[int]:
    """
    The indices of the candidates below the threshold, the least similar first; at most `limit`. The first is the index
    of `select`; empty if there is none.

    Example: similarities 0.05, -0.2, 0.4 give [1, 0] with threshold 0.1, and [1] with limit 1.
    """
    kept = [(c["similarities"][pooling], i) for i, c in enumerate(candidates) if c["dropped"] is None]
    return [index for similarity, index in sorted(kept) if similarity < threshold][:limit]


def misfit_reason(emotion: str | None, candidates: Sequence[dict], pooling: str) -> str | None:
    """
    Why the true reply does not fit the emotion of the sentence, or None if it does: it fits if no candidate is more
    similar to it than the candidate that was written for this emotion.

    Args:
        emotion: emotion of the sentence, or None.
        candidates: candidates with `emotion` and `similarities` (pooling -> cosine with the true reply, or None).
        pooling: the pooling whose similarities are compared.
    """
    found = {c["emotion"]: c["similarities"][pooling] for c in candidates if c["similarities"][pooling] is not None}
    if emotion not in found:
        return f"no candidate tells whether the true reply fits: the emotion of the sentence is {emotion}"
    nearest = max(found, key=lambda name: (found[name], name == emotion))
    if nearest == emotion:
        return None
    return (
        f"the true reply does not fit {emotion}: it is more similar to the candidate for {nearest} "
        f"({found[nearest]:.3f}) than to the candidate for {emotion} ({found[emotion]:.3f})"
    )


def sample_name(sample: dict) -> str:
    """The name of a sample in the report: corpus/split/dialogue/turn, with the turn of the reply."""
    return "/".join(str(sample[key]) for key in ("corpus", "split", "dialogue_id", "turn"))


def pair_features(plain_text: bool = False, negatives: bool = False) -> Features:
    """
    The columns of the preference rows, as `datasets.Features`. Missing keys of content items are null.

    Args:
        plain_text: whether the contents of the prompt's messages are strings, not lists of items.
        negatives: whether the rows have the column `negatives`, with their further rejected replies.
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
            **{key: text for key in PAIR_IDS},
            "turn": Value("int32"),
            "prompt": [{"role": text, "name": text, "content": text if plain_text else [item]}],
            "chosen": reply,
            "rejected": reply,
            **({NEGATIVES: [reply]} if negatives else {}),
            "rejected_emotion": text,
            "similarity": Value("float64"),
            "candidates": [candidate],
        }
    )


def make_row(
    sample: dict,
    candidates: Sequence[dict],
    index: int,
    pooling: str,
    plain_text: bool = False,
    further: Sequence[int] | None = None,
) -> dict:
    """
    Make a preference row in TRL's format with the columns of `pair_features`: the true reply is chosen and candidate
    `index` is rejected. With `plain_text`, the prompt has no clips. If the indices `further` are given, the column
    `negatives` has these candidates.

    Raises:
        ValueError: if media is neither a path nor bytes; the message names the sample.
    """
    rejected = candidates[index]
    return {
        **{key: sample[key] for key in PAIR_IDS},
        "prompt": [_message(sample, message, plain_text) for message in sample["prompt"]],
        "chosen": _reply(sample["reply"]),
        "rejected": _reply(rejected["text"]),
        **({} if further is None else {NEGATIVES: [_reply(candidates[i]["text"]) for i in further]}),
        "rejected_emotion": rejected["emotion"],
        "similarity": rejected["similarities"][pooling],
        "candidates": [{**c, "similarity": c["similarities"][pooling]} for c in candidates],
    }


def _reply(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


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
                f"{sample_name(sample)}: a content item of type {item['type']} has {', '.join(sorted(extra))}; give "
                "media as `path` or `bytes`."
            )
    return {**message, "content": list(content)}


class PairWriter:
    """
    Context manager that streams rows into one parquet file, which is created with the first row group.

    Args:
        path: path of the file.
        plain_text, negatives: see `pair_features`.
    """

    def __init__(self, path, plain_text: bool = False, negatives: bool = False):
        self.path, self.schema = path, pair_features(plain_text, negatives).arrow_schema
        self.rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._group: list[dict] = []
        self._bytes = 0

    def write(self, row: dict) -> None:
        """Add a row of `make_row`."""
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

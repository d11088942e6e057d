"""Preference rows and their collator, which makes batches of chosen and rejected sequences.

Rows are tokenized, and their media decoded, when a batch is made, in the data loader's workers. Nothing is cached.
"""

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data_prep.clip_digests import MEDIA_KINDS
from ..data_prep.loading import NEGATIVES, PAIR_COLUMNS
from ..data_prep.messages import clip_of
from ..processing_empathic import MODALITIES
from .clip_negatives import ClipNegatives, with_clips
from .frozen.feature_cache import FeatureCache, FeatureCacheError, MediaDraws
from .frozen.outputs import no_entry, stack_entries
from .losses import IGNORE_INDEX

logger = logging.getLogger(__name__)

# Columns of a conversational row for a text model, which its chat template gets, as in TRL.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
# Columns of our own data sets that say where a row comes from, and of `PairRows`.
_KNOWN_COLUMNS = {
    *("corpus", "split", "dialogue_id", "turn", "utterance_id", "emotion", "rejected_emotion", "similarity"),
    *("candidates", "row_id", "sampling_seed", "frozen", "clip_negative", NEGATIVES),
}
# Columns that trainers of TRL or other data sets use as inputs. To ignore one would be to train on another prompt.
_INPUT_COLUMNS = {
    *("image", "images", "video", "videos", "audio", "audios", "system", "documents", *TEMPLATE_COLUMNS),
}


class PairRows(Dataset):
    """A data set of preference rows whose items also carry `row_id` and `sampling_seed`.

    `sampling_seed` is (seed, epoch, row_id) in training and None in evaluation. All random choices of a row, such as
    its video frames, are drawn from this seed alone. The tensors of a row therefore do not depend on its rank, worker
    or place in a batch, and a resumed run continues exactly like an uninterrupted run.

    If `frozen`, the entries of [`FrozenOutputs`], is set, an item also has its entry as `frozen`.

    With `clip_negatives`, an item also has `clip_negative`, unless the row cannot have one: the clips of another row
    ({kind: item}) that [`ClipNegatives`] draws from the seed and the epoch (in evaluation: the same in every epoch), or
    if `frozen` is set, the entry of the row with the vectors of these clips.
    """

    def __init__(
        self,
        rows: Sequence[dict],
        name: str,
        seed: int | None = None,
        multimodal: bool | None = None,
        clip_negatives: bool = False,
    ):
        """`name` is the data set's name in messages ("train"); `seed` (from 0) turns random sampling on.

        `multimodal` says whether the rows are for a model with a processor; if given, the columns of the rows are
        checked: a warning names those that are ignored.

        Raises:
            ValueError: if there are no rows, `rows` has no length, the first row is not a preference row, the rows have
                a column that must not be ignored, or with `clip_negatives`, no training row can have a clip negative.
        """
        try:
            length = len(rows)
        except TypeError:
            raise ValueError(
                f"The {name} data set has no length: EPOTrainer needs rows that it can index, not a stream."
            ) from None
        if length == 0:
            raise ValueError(f"The {name} data set is empty: EPOTrainer needs at least one preference row.")
        check_row(rows[0], 0)
        if multimodal is not None:
            _check_columns(rows, name, multimodal)
        self.rows = rows
        self.name = name
        self.seed = seed
        self.frozen: list[dict] | None = None
        self._clips = None
        if clip_negatives:
            self._clips = ClipNegatives(rows)
            _report_clips(self._clips.without, length, name, is_error=seed is not None)
        # In shared memory, because persistent workers must see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        seed = None if self.seed is None else (self.seed, int(self._epoch), int(index))
        row = {**self.rows[index], "row_id": int(index), "sampling_seed": seed}
        if self.frozen is not None:
            row["frozen"] = self.frozen[index]
        donor = None if self._clips is None else self._clips.draw(int(index), (0, 0) if seed is None else seed[:2])
        if donor is not None:
            row["clip_negative"] = self._clip_negative(row, self._clips.kinds(int(index)), donor)
        return row

    def _clip_negative(self, row: dict, kinds: Sequence[str], donor: int) -> dict:
        """The clips of a donor, or the row's `frozen` entry with their vectors; or the reason why they are missing."""
        if self.frozen is None:
            messages = self.rows[donor]["prompt"]
            return {kind: clip_of(messages, kind) for kind in kinds}
        given = self.frozen[donor]
        if "left_out" in given:
            return {"left_out": given["left_out"]}
        return {**row["frozen"], **{kind: given[kind] for kind in kinds}}


class PreferenceCollator:
    """Makes a batch of preference rows with an explicit `prompt`, `chosen` and `rejected`.

    With `negatives`, a row may have further rejected replies in the column `negatives`, the least similar to the true
    reply first; it has the same form as `rejected`, in a list. With `clip_negative`, see [`PairRows`], the chosen reply
    also follows the prompt with other clips.

    A row is conversational (`prompt`: a list of messages; `chosen`, `rejected`: a list of one assistant message each)
    or plain (three strings). Every reply ends with exactly one EOS token. As in TRL, a conversational row of a text
    model may also have `tools` (a list of JSON schemas, or its JSON) and `chat_template_kwargs` (a dict) for the chat
    template. Columns with other inputs, such as `images`, are an error.

    The tensors hold 2 * pairs rows, right-padded: first the chosen sequence of each pair, then the rejected ones.
    Further rejected replies, pair by pair, and the sequences with other clips follow.

    - `input_ids`, `attention_mask`, `labels`: (sequences, length). Labels are -100 except on the tokens of the replies.
    - `negative_of`: (further rejected replies,), the place in the batch of the pair of each; only with `negatives`.
    - `clip_of`: (sequences with other clips,), likewise; only if a row has `clip_negative`.
    - `row_ids`: (pairs,), the row's index in the data set.
    - `logits_to_keep`: int, the number of positions, from the end, whose logits the loss needs.
    - `left_out`: list of (row id, reason). A pair that is longer than `max_length`, or whose media cannot be read,
      keeps its place in the batch as two tokens without a label, so that every rank always has a batch to run.
    - `left_out_negatives`: list of (row id, number of the rejected reply, reason), with `negatives`: rejected replies
      that are longer than `max_length`, of pairs that have another.
    - `left_out_clips`: list of (row id, reason), along with `clip_of`: the other clips cannot be read.
    - with a processor: all media and memory keys of `processor.pad`, for all sequences; if the rows have `frozen`
      entries, the tensors of `stack_entries` instead, for the pairs and then the sequences with other clips.

    Args:
        processing_class: an [`EmpathicProcessor`], or the tokenizer of a text model.
        max_length: longest prompt + reply in tokens; None for no limit.
        history: how the processor gives the earlier turns, "memory" or "text".
        frame_draws: the number of fixed frame draws of a clip, of which a row takes one; 0: evenly spaced frames; None:
            new random frames each time.
        cache: gives the features of the encoders in place of the clips, and the frame draws.
        negatives: the largest number of rejected replies of a row; 1: only the column `rejected`; None: no limit.
        clips: whether any prompt of the run may have a clip. If so, each batch has clips, of zeros where it has none,
            so that every rank runs the encoders.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        max_length: int | None = None,
        history: str = "memory",
        frame_draws: int | None = None,
        cache: FeatureCache | None = None,
        negatives: int | None = 1,
        clips: bool = True,
    ):
        self.modalities = MODALITIES if clips else ("memory",)
        self.media_draws, self.cache = MediaDraws(frame_draws), cache
        self.is_multimodal = isinstance(processing_class, ProcessorMixin)
        self.processor: Any = processing_class if self.is_multimodal else None  # methods of EmpathicProcessor
        self.tokenizer: Any = processing_class.tokenizer if self.is_multimodal else processing_class
        self.max_length = max_length
        self.history = history
        self.negatives = negatives
        if self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, which must end every reply. Set `tokenizer.eos_token`.")
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: list[dict]) -> dict:
        """Make a batch of rows from [`PairRows`], or of plain preference rows, which are then numbered from 0.

        Raises:
            ValueError: if a row is not a preference row; the message names its id and keys.
        """
        pairs, left_out, row_ids = [], [], []
        other_clips, clip_of_pair, left_out_clips = [], [], []  # the prompts with other clips, and their pairs
        is_frozen = any("frozen" in row for row in rows)
        for position, row in enumerate(rows):
            row_id = row.get("row_id", position)
            row_ids.append(row_id)
            pair, reason = self._encode(row, row_id)
            if pair is None:
                left_out.append((row_id, reason))
            elif "clip_negative" in row:
                prompt, reason = self._with_other_clips(row)
                if prompt is None:
                    left_out_clips.append((row_id, reason))
                else:
                    other_clips.append(prompt)
                    clip_of_pair.append(position)
            pairs.append(pair or self._empty_pair())

        sequences = [pair["chosen"] for pair in pairs] + [pair["rejected"][0] for pair in pairs]
        sequences += [reply for pair in pairs for reply in pair["rejected"][1:]]
        negative_of = [place for place, pair in enumerate(pairs) for _ in pair["rejected"][1:]]
        for place, prompt in zip(clip_of_pair, other_clips, strict=True):
            ids, start = pairs[place]["chosen"]
            sequences.append((prompt["input_ids"] + ids[start:], len(prompt["input_ids"])))
        # The media and memory of the prompts are made once for each prompt, and repeated only in the last line.
        prompts = [pair["prompt"] for pair in pairs] + other_clips
        prompt_of = [*range(len(pairs))] * 2 + negative_of + [*range(len(pairs), len(prompts))]
        shared, frozen = {}, {}
        if is_frozen:
            frozen = stack_entries(prompts)
        elif self.is_multimodal:
            sizes = None if self.cache is None else self.cache.sizes
            shared = self.processor.pad(prompts, all_modalities=self.modalities, feature_sizes=sizes)
        shared = {key: value for key, value in shared.items() if key not in ("input_ids", "attention_mask")}
        further = {}
        if self.negatives != 1:
            dropped = [
                (row_id, *found) for row_id, pair in zip(row_ids, pairs, strict=True) for found in pair["left_out"]
            ]
            further |= {"negative_of": torch.tensor(negative_of, dtype=torch.long), "left_out_negatives": dropped}
        if any("clip_negative" in row for row in rows):
            further |= {"clip_of": torch.tensor(clip_of_pair, dtype=torch.long), "left_out_clips": left_out_clips}
        return {
            **self._pad(sequences),
            "row_ids": torch.tensor(row_ids),
            "left_out": left_out,
            **further,
            **frozen,
            **{key: value[prompt_of] for key, value in shared.items()},
        }

    def prompt(self, row: dict) -> tuple[dict | None, str]:
        """Return the prompt, as `EmpathicProcessor.prepare` gives it, and ""; or None and why the row is left out."""
        pair, reason = self._encode(row, row.get("row_id", 0))
        return (None if pair is None else pair["prompt"]), reason

    def prompt_and_target(self, row: dict) -> tuple[dict, str] | None:
        """Return the prompt, as `EmpathicProcessor.prepare` gives it, and the chosen reply; None for a row left out.

        For generation, and only with a processor. The clips are read even if the row has a `frozen` entry.
        """
        pair, _ = self._encode({key: value for key, value in row.items() if key != "frozen"}, row.get("row_id", 0))
        if pair is None:
            return None
        chosen = row["chosen"]
        return pair["prompt"], chosen if isinstance(chosen, str) else _text(_without_none(chosen[0]))

    def _pad(self, sequences: list[tuple[list[int], int]]) -> dict:
        """Make right-padded text tensors and `logits_to_keep` of [(token ids, index of the reply's first token)]."""
        length = max(len(ids) for ids, _ in sequences)
        input_ids = torch.full((len(sequences), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for index, (ids, start) in enumerate(sequences):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            attention_mask[index, : len(ids)] = 1
            labels[index, start : len(ids)] = input_ids[index, start : len(ids)]
        # The logits at position i predict token i + 1; no position predicts token 0.
        first = min((max(start, 1) for ids, start in sequences if start < len(ids)), default=length - 1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": length - first + 1,
        }

    def _encode(self, row: dict, row_id: int) -> tuple[dict | None, str]:
        """
        Encode a row as {"prompt", "chosen", "rejected": a list, "left_out": [(number of a rejected reply, reason)]} and
        ""; or None and the reason why the pair is left out.
        """
        check_row(row, row_id)
        negatives = self._negatives(row, row_id)
        seed, frozen = row.get("sampling_seed"), row.get("frozen", {})
        refuse_input_columns(row, f"Row {row_id}", self.is_multimodal)
        if "left_out" in frozen:
            return None, frozen["left_out"]
        options = {} if self.is_multimodal else _template_options(row)
        row = {column: _without_none(row[column]) for column in PAIR_COLUMNS}
        _check_contents(row, row_id, self.is_multimodal)
        names = [*PAIR_COLUMNS[1:], *[NEGATIVES] * len(negatives)]
        sides = [row["chosen"], row["rejected"], *negatives]
        prompt = None
        if isinstance(row["prompt"], str):
            prompt_ids = self._ids(row["prompt"])
            if self.is_multimodal:
                prompt = frozen or {**_NO_MEDIA, "input_ids": prompt_ids}
            replies = [self._after_text(prompt_ids, row["prompt"] + side, self._bos()) for side in sides]
        elif self.is_multimodal:
            prompt, reason = (frozen, "") if frozen else self._prepare(row["prompt"], seed)
            if prompt is None:
                return None, reason
            # The prompt ends with control tokens, so its last token cannot merge with the reply.
            start = len(prompt["input_ids"])
            replies = [(prompt["input_ids"] + self.processor.encode_reply(_text(side[0])), start) for side in sides]
        else:
            replies = [self._after_template(row["prompt"], side, row_id, options) for side in sides]

        rejected, left_out = [], []
        for number, (side, reply) in enumerate(zip(names, replies, strict=True)):
            reason = self._why_not(side, reply)
            if reason and number == 0:
                return None, reason
            if reason:
                left_out.append((number, reason))
            elif number > 0:
                rejected.append(reply)
        if not rejected:
            return None, left_out[0][1]
        return {"prompt": prompt, "chosen": replies[0], "rejected": rejected, "left_out": left_out}, ""

    def _why_not(self, side: str, reply: tuple[list[int], int]) -> str:
        """Why a sequence cannot be used, or ""; `side` is its column."""
        ids, start = reply
        if len(ids) - max(start, 1) < 1:
            return f"prompt and {side} are both empty, so there is no token to predict"
        if self.max_length is not None and len(ids) > self.max_length:
            return (
                f"prompt + {side} have {len(ids)} tokens, more than max_length={self.max_length}. "
                "Raise max_length or shorten the row"
            )
        return ""

    def _negatives(self, row: dict, row_id: int) -> list:
        """The further rejected replies of a row that are used. Raises a ValueError if they are not like `rejected`."""
        if self.negatives == 1:
            return []
        found = row.get(NEGATIVES) or []
        if not isinstance(found, list):
            raise ValueError(f"Row {row_id}: negatives must be a list of rejected replies, got {type(found).__name__}.")
        for reply in found:
            check_row({**row, "rejected": reply}, row_id, NEGATIVES)
        found = _without_none(found)
        if found[:1] == [_without_none(row["rejected"])]:  # some data sets repeat the first one in the list
            found = found[1:]
        for reply in found:
            _check_contents({**row, "rejected": reply}, row_id, self.is_multimodal, NEGATIVES)
        return found if self.negatives is None else found[: self.negatives - 1]

    def _prepare(self, messages: list[dict], seed) -> tuple[dict | None, str]:
        """Prepare a prompt with its clips; or return None and why they cannot be read, which must not end a run."""
        generator = None  # frames are sampled at random in training and evenly in evaluation
        try:
            if self.cache is not None:
                messages = self.cache.fill(messages, seed)
            else:
                generator = self.media_draws.generator(messages, seed)
            return self.processor.prepare(messages, history=self.history, generator=generator), ""
        except FeatureCacheError:  # a clip that should be in the cache
            raise
        except (ValueError, OSError) as error:
            return None, str(error)

    def _with_other_clips(self, row: dict) -> tuple[dict | None, str]:
        """Return the prompt of a row's `clip_negative`; or None and why it cannot be read."""
        clips = row["clip_negative"]
        if "left_out" in clips:
            return None, clips["left_out"]
        if "frozen" in row:
            return clips, ""
        return self._prepare(with_clips(_without_none(row["prompt"]), _without_none(clips)), row.get("sampling_seed"))

    def _empty_pair(self) -> dict:
        """The replacement for a pair that is left out: two tokens without a target."""
        ids = [self.tokenizer.eos_token_id] * 2
        prompt = {**_NO_MEDIA, **no_entry(ids)} if self.is_multimodal else None
        return {"prompt": prompt, "chosen": (ids, len(ids)), "rejected": [(ids, len(ids))], "left_out": []}

    def _ids(self, text: str) -> list[int]:
        if self.is_multimodal:
            return self.processor.encode_plain(text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def _after_text(self, prompt_ids: list[int], text: str, bos: list[int]) -> tuple[list[int], int]:
        """Return the token ids of `text` (prompt + reply), ending with one EOS, and the index where the reply starts.

        A tokenizer with merges may join the last character of the prompt with the first character of the reply. The two
        are therefore tokenized together, and the reply starts where the common prefix with the prompt tokens ends.
        """
        ids = self._ids(text)
        start = _shared_length(prompt_ids, ids)
        if len(ids) == start or ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        if bos and (start == 0 or ids[0] != bos[0]):
            ids, start = bos + ids, start + 1
        return ids, start

    def _after_template(
        self, prompt: list[dict], reply: list[dict], row_id: int, options: dict
    ) -> tuple[list[int], int]:
        """
        Like `_after_text`, for messages and a text model, whose chat template also writes control tokens and BOS.
        `options` are further arguments of the template.
        """
        template = partial(self.tokenizer.apply_chat_template, **options)
        text = template(prompt + reply, tokenize=False)
        opening = template(prompt, tokenize=False, add_generation_prompt=True)
        opening = opening[: _shared_length(opening, text)]
        if not opening.startswith(template(prompt, tokenize=False)):
            raise ValueError(
                f"Row {row_id}: the chat template writes the prompt differently when a reply follows, so the start of "
                "the reply is unknown. Give the prompt and the replies as plain strings instead."
            )
        # Templates end a turn with EOS and often a line break: replace all of this by a single EOS.
        while text.rstrip().endswith(self.tokenizer.eos_token):
            text = text.rstrip().removesuffix(self.tokenizer.eos_token)
        return self._after_text(self._ids(opening), text, bos=[])


_NO_MEDIA = {"memory_input_ids": [], "video": None, "audio": None}


def check_row(row: dict, row_id: int, name: str = "rejected") -> None:
    """
    Raise a ValueError, with the row's id and keys, unless it is a preference row with an explicit prompt. `name` is the
    column, in messages, of the rejected reply.
    """
    if any(column not in row for column in PAIR_COLUMNS):
        hint = " An implicit prompt (the shared start of chosen and rejected) must be split off first."
        raise ValueError(
            f"Row {row_id} has the keys {sorted(row)}, but a preference row needs prompt, chosen and rejected."
            + (hint if "prompt" not in row and "chosen" in row else "")
        )
    names = dict(zip(PAIR_COLUMNS, (*PAIR_COLUMNS[:2], name), strict=True))
    kinds = {names[column]: type(row[column]).__name__ for column in PAIR_COLUMNS}
    if set(kinds.values()) == {"str"}:
        return
    if set(kinds.values()) != {"list"}:
        raise ValueError(
            f"Row {row_id}: prompt, chosen and {name} must be three strings or three lists of messages, got {kinds}."
        )
    if not row["prompt"]:
        raise ValueError(f"Row {row_id}: prompt is an empty list. It needs at least one user message.")
    for column in PAIR_COLUMNS[1:]:
        roles = [message.get("role") if isinstance(message, dict) else message for message in row[column]]
        if roles != ["assistant"]:
            raise ValueError(f"Row {row_id}: {names[column]} must be one assistant message, got the roles {roles}.")


def shows_clip(prompt: str | list) -> bool:
    """Whether a prompt has a clip. Messages that are not valid have none; the collator reports them."""
    messages = [message for message in prompt if isinstance(message, dict)] if isinstance(prompt, list) else []
    items = [item for message in messages if isinstance(message.get("content"), list) for item in message["content"]]
    return any(isinstance(item, dict) and item.get("type") in MEDIA_KINDS for item in items)


def _template_options(row: dict) -> dict:
    """The arguments of the chat template in a row, as TRL reads them."""
    tools, options = (_without_none(row.get(column)) for column in TEMPLATE_COLUMNS)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**(options or {}), **({"tools": tools} if tools else {})}


def refuse_input_columns(row: dict, where: str, multimodal: bool) -> None:
    """Raise a ValueError if a row has a value in a column of inputs that would be ignored."""
    is_plain = isinstance(row["prompt"], str)
    for column in sorted(_INPUT_COLUMNS & row.keys()):
        if row[column] is None or (isinstance(row[column], (list, dict, str)) and not row[column]):
            continue
        if column in TEMPLATE_COLUMNS:
            if not is_plain and not multimodal:
                continue
            why = (
                "a prompt that is a string has no chat template"
                if is_plain
                else "this model's templates have no such input"
            )
        elif multimodal:
            why = 'clips belong in the last message of the prompt, as {"type": "video", "path": ...}'
        else:
            why = "the model reads text alone"
        raise ValueError(
            f"{where} has the column {column}, which would be ignored: {why}. Remove the column, or put its content "
            "into the prompt."
        )


def _check_columns(rows: Sequence[dict], name: str, multimodal: bool) -> None:
    """Refuse columns of inputs that would be ignored, and warn about other columns that are."""
    columns = getattr(rows, "column_names", None)
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row)) if isinstance(rows, list) else list(rows[0])
    suspects = _INPUT_COLUMNS & set(columns)
    if not multimodal and not isinstance(rows[0]["prompt"], str):
        suspects -= set(TEMPLATE_COLUMNS)
    if suspects:
        inputs = rows.select_columns([*suspects, "prompt"]) if isinstance(rows, datasets.Dataset) else rows
        for number in range(len(inputs)):
            refuse_input_columns(inputs[number], f"Row {number} of the {name} data set", multimodal)
    ignored = set(columns) - _KNOWN_COLUMNS - _INPUT_COLUMNS - set(PAIR_COLUMNS)
    if ignored:
        logger.warning("The %s data set has columns that are not used: %s.", name, ", ".join(sorted(ignored)))


def _check_contents(row: dict, row_id: int, multimodal: bool, name: str = "rejected") -> None:
    """
    Check the contents of a conversational row without None. `name` is the column, in messages, of the rejected reply.

    Raises:
        ValueError: for a reply without content, or a message to a text model that holds anything but text.
    """
    for column in PAIR_COLUMNS if isinstance(row["prompt"], list) else ():
        shown = name if column == "rejected" else column
        for message in row[column]:
            content = message.get("content") if isinstance(message, dict) else None
            items = content if isinstance(content, list) else []
            kinds = [item.get("type") if isinstance(item, dict) else None for item in items]
            is_reply = column != "prompt"
            if not isinstance(content, (str, list)) and (is_reply or not multimodal):
                if not multimodal and isinstance(message, dict) and message.get("tool_calls"):
                    continue  # the chat template writes the calls
                raise ValueError(
                    f"Row {row_id}: a message of {shown} has the content {content!r}. Give a string or a list of text "
                    "items, or leave the row out."
                )
            if (is_reply or not multimodal) and any(kind != "text" for kind in kinds):
                raise ValueError(
                    f"Row {row_id}: a message of {shown} has an item of the type "
                    f"{next(kind for kind in kinds if kind != 'text')!r}. "
                    + ("A reply is text." if is_reply else "The model reads text alone. ")
                    + ("" if is_reply else "Give text items, or a multimodal model with its processor.")
                )


def _report_clips(without: dict[str, int], rows: int, name: str, is_error: bool) -> None:
    """Report the rows that have no clip of another emotion, by reason; with `is_error`, raise if none has one."""
    count = sum(without.values())
    reasons = "; ".join(f"{number} because {reason}" for reason, number in sorted(without.items()))
    if count == rows and is_error:
        raise ValueError(
            f"clip_negatives is on, but no row of the {name} data set can have the clip of another emotion: {reasons}. "
            "Give rows with clips and, in the column emotion, at least two emotions; or leave clip_negatives out."
        )
    if count:
        logger.warning("%d of %d %s rows get no preference over the clip: %s.", count, rows, name, reasons)


def _without_none(value):
    """Drop keys whose value is None: Arrow gives every message the keys of all messages, filled with None."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _shared_length(first: Sequence, second: Sequence) -> int:
    """Return the length of the longest common prefix."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _text(message: dict) -> str:
    """The text of a reply: a string, or the text parts of its content."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")

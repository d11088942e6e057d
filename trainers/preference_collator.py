"""Preference rows -> batches of chosen and rejected sequences.

Rows are tokenised, and their media decoded, when a batch is made: in the data loader's workers, with nothing kept.
"""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from empathic.trainers.feature_cache import FeatureCache, FeatureCacheError, MediaDraws
from empathic.trainers.frozen_outputs import no_entry, stack_entries

COLUMNS = ("prompt", "chosen", "rejected")
IGNORE = -100  # the label of a token that is no target


class PairRows(Dataset):
    """A data set of preference rows whose items also carry `row_id` and `sampling_seed`.

    `sampling_seed` is (seed, epoch, row_id) in training and None in evaluation. All that is random in a row, such as
    which video frames it shows, is drawn from that seed alone. So a row gives the same tensors on whichever rank,
    worker or place in a batch it is made, and a resumed run goes on exactly as the unbroken one would have.

    With `frozen`, the entries of [`FrozenOutputs`], an item also carries its own as `frozen`.
    """

    def __init__(self, rows: Sequence[dict], name: str, seed: int | None = None):
        """`name` is how messages call it ("train"); `seed` (from 0) turns random sampling on.

        Raises:
            ValueError: there are no rows, they have no length, or the first one is not a preference row.
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
        self.rows = rows
        self.name = name
        self.seed = seed
        self.frozen: list[dict] | None = None
        # In shared memory, because workers that outlive an epoch must see it change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        seed = None if self.seed is None else (self.seed, int(self._epoch), int(index))
        row = {**self.rows[index], "row_id": int(index), "sampling_seed": seed}
        return row if self.frozen is None else {**row, "frozen": self.frozen[index]}


class PreferenceCollator:
    """Makes a batch out of preference rows with an explicit `prompt`, `chosen` and `rejected`.

    A row is conversational (`prompt`: a list of messages; `chosen`, `rejected`: a list of one assistant message each)
    or plain (three strings). Every reply ends with exactly one EOS token.

    The tensors hold 2 * pairs rows, right-padded: first the chosen sequence of each pair, then the rejected ones.

    - `input_ids`, `attention_mask`, `labels`: (2 * pairs, length). Labels are -100 but on the replies' tokens.
    - `row_ids`: (pairs,), the row's index in the data set.
    - `logits_to_keep`: int, the positions from the end whose logits the loss needs.
    - `left_out`: list of (row id, reason). A pair that is longer than `max_length`, or whose media cannot be read,
      keeps its place in the batch as two tokens without a label. So every rank always has a batch to run.
    - with a processor: all media and memory keys of `processor.pad`, for 2 * pairs rows; for rows with a `frozen`
      entry the tensors of `stack_entries` in their place, for pairs rows.

    Args:
        processing_class: an [`EmpathicProcessor`], or the tokenizer of a text model.
        max_length: longest prompt + reply in tokens; None for no limit.
        history: how a processor gives the earlier turns, "memory" or "text".
        frame_draws: a row takes one of so many fixed frame draws of its clip, 0: evenly spaced frames; None: new random
            frames each time.
        cache: gives the towers' features in place of the clips, and their draws.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        max_length: int | None = None,
        history: str = "memory",
        frame_draws: int | None = None,
        cache: FeatureCache | None = None,
    ):
        self.media_draws, self.cache = MediaDraws(frame_draws), cache
        self.is_multimodal = isinstance(processing_class, ProcessorMixin)
        self.processor = processing_class if self.is_multimodal else None
        self.tokenizer = processing_class.tokenizer if self.is_multimodal else processing_class
        self.max_length = max_length
        self.history = history
        if self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no EOS token, which must end every reply. Set `tokenizer.eos_token`.")
        pad = self.tokenizer.pad_token_id
        self.pad_token_id = self.tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: list[dict]) -> dict:
        """Rows as [`PairRows`] gives them; plain preference rows do too, and are then numbered from 0.

        Raises:
            ValueError: a row is not a preference row (its id and keys are named).
        """
        pairs, left_out, row_ids = [], [], []
        is_frozen = any("frozen" in row for row in rows)
        for position, row in enumerate(rows):
            row_id = row.get("row_id", position)
            row_ids.append(row_id)
            pair, reason = self._encode(row, row_id)
            if pair is None:
                left_out.append((row_id, reason))
            pairs.append(pair or self._empty_pair())

        # The prompts' media and memory are made for `pairs` rows and repeated in the last line, nowhere else.
        shared, frozen = {}, {}
        if is_frozen:
            frozen = stack_entries([pair["prompt"] for pair in pairs])
        elif self.is_multimodal:
            sizes = None if self.cache is None else self.cache.sizes
            prompts = [pair["prompt"] for pair in pairs]
            shared = self.processor.pad(prompts, all_modalities=True, feature_sizes=sizes)
        shared = {key: value for key, value in shared.items() if key not in ("input_ids", "attention_mask")}
        sequences = [pair["chosen"] for pair in pairs] + [pair["rejected"] for pair in pairs]
        return {
            **self._pad(sequences),
            "row_ids": torch.tensor(row_ids),
            "left_out": left_out,
            **frozen,
            **{key: torch.cat([value, value]) for key, value in shared.items()},
        }

    def prompt(self, row: dict) -> tuple[dict | None, str]:
        """The prompt alone, as `EmpathicProcessor.prepare` gives it, and ""; or None and why the row is left out."""
        pair, reason = self._encode(row, row.get("row_id", 0))
        return (None if pair is None else pair["prompt"]), reason

    def prompt_and_target(self, row: dict) -> tuple[dict, str] | None:
        """The prompt alone, as `EmpathicProcessor.prepare` gives it, and the chosen reply; None for a row that is left
        out. Only with a processor. The clips are read, also for a row with a `frozen` entry: this is for generation."""
        pair, _ = self._encode({key: value for key, value in row.items() if key != "frozen"}, row.get("row_id", 0))
        if pair is None:
            return None
        chosen = row["chosen"]
        return pair["prompt"], chosen if isinstance(chosen, str) else _text(_without_none(chosen[0]))

    def _pad(self, sequences: list[tuple[list[int], int]]) -> dict:
        """[(token ids, index of the reply's first token)] -> right-padded text tensors and `logits_to_keep`."""
        length = max(len(ids) for ids, _ in sequences)
        input_ids = torch.full((len(sequences), length), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for index, (ids, start) in enumerate(sequences):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            attention_mask[index, : len(ids)] = 1
            labels[index, start : len(ids)] = input_ids[index, start : len(ids)]
        # The logits at position i predict token i + 1, and nothing predicts token 0.
        first = min((max(start, 1) for ids, start in sequences if start < len(ids)), default=length - 1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": length - first + 1,
        }

    def _encode(self, row: dict, row_id: int) -> tuple[dict | None, str]:
        """A row -> {"prompt", "chosen", "rejected"}, or None and the reason why the pair is left out."""
        check_row(row, row_id)
        seed, frozen = row.get("sampling_seed"), row.get("frozen", {})
        if "left_out" in frozen:
            return None, frozen["left_out"]
        row = {column: _without_none(row[column]) for column in COLUMNS}
        prompt = None
        if isinstance(row["prompt"], str):
            prompt_ids = self._ids(row["prompt"])
            if self.is_multimodal:
                prompt = frozen or {**_NO_MEDIA, "input_ids": prompt_ids}
            replies = [self._after_text(prompt_ids, row["prompt"] + row[side], self._bos()) for side in COLUMNS[1:]]
        elif self.is_multimodal:
            # Frames are sampled at random in training and evenly in evaluation.
            messages, generator = row["prompt"], None
            try:
                if not frozen and self.cache is not None:
                    messages = self.cache.fill(messages, seed)
                elif not frozen:
                    generator = self.media_draws.generator(messages, seed)
                prompt = frozen or self.processor.prepare(messages, history=self.history, generator=generator)
            except FeatureCacheError:  # a clip that the cache should have
                raise
            except (ValueError, OSError) as error:  # a clip that cannot be read must not end a long run
                return None, str(error)
            # The prompt ends with control tokens, so nothing of it can merge with the reply.
            start = len(prompt["input_ids"])
            replies = [
                (prompt["input_ids"] + self.processor.encode_reply(_text(row[side][0])), start) for side in COLUMNS[1:]
            ]
        else:
            replies = [self._after_template(row["prompt"], row[side], row_id) for side in COLUMNS[1:]]

        for side, (ids, start) in zip(COLUMNS[1:], replies, strict=True):
            if len(ids) - max(start, 1) < 1:
                return None, f"prompt and {side} are both empty, so there is no token to predict"
            if self.max_length is not None and len(ids) > self.max_length:
                return None, (
                    f"prompt + {side} have {len(ids)} tokens, more than max_length={self.max_length}. "
                    "Raise max_length or shorten the row"
                )
        return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1]}, ""

    def _empty_pair(self) -> dict:
        """Stands in for a pair that is left out: two tokens, none of them a target."""
        ids = [self.tokenizer.eos_token_id] * 2
        prompt = {**_NO_MEDIA, **no_entry(ids)} if self.is_multimodal else None
        return {"prompt": prompt, "chosen": (ids, len(ids)), "rejected": (ids, len(ids))}

    def _ids(self, text: str) -> list[int]:
        if self.is_multimodal:
            return self.processor.encode_plain(text)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    def _after_text(self, prompt_ids: list[int], text: str, bos: list[int]) -> tuple[list[int], int]:
        """Token ids of `text` (prompt + reply), ending with one EOS, and where the reply starts.

        A tokenizer with merges may join the prompt's last character with the reply's first one. The two are therefore
        tokenised together, and the reply starts where the common prefix with the prompt's own tokens ends.
        """
        ids = self._ids(text)
        start = _shared_length(prompt_ids, ids)
        if len(ids) == start or ids[-1] != self.tokenizer.eos_token_id:
            ids = [*ids, self.tokenizer.eos_token_id]
        if bos and (start == 0 or ids[0] != bos[0]):
            ids, start = bos + ids, start + 1
        return ids, start

    def _after_template(self, prompt: list[dict], reply: list[dict], row_id: int) -> tuple[list[int], int]:
        """The text model's way: its chat template writes prompt and reply, control tokens and BOS included."""
        template = self.tokenizer.apply_chat_template
        text = template(prompt + reply, tokenize=False)
        opening = template(prompt, tokenize=False, add_generation_prompt=True)
        opening = opening[: _shared_length(opening, text)]
        if not opening.startswith(template(prompt, tokenize=False)):
            raise ValueError(
                f"Row {row_id}: the chat template writes the prompt differently once a reply follows it, so it cannot "
                "be told where the reply starts. Give the prompt and the replies as plain strings instead."
            )
        # Templates end a turn with EOS and often a line break: everything from that EOS on gives way to one EOS.
        while text.rstrip().endswith(self.tokenizer.eos_token):
            text = text.rstrip().removesuffix(self.tokenizer.eos_token)
        return self._after_text(self._ids(opening), text, bos=[])


_NO_MEDIA = {"memory_input_ids": [], "video": None, "audio": None}


def check_row(row: dict, row_id: int) -> None:
    """Raises:
    ValueError: `row` is not a preference row with an explicit prompt; the message names its id and what it has.
    """
    if any(column not in row for column in COLUMNS):
        hint = " An implicit prompt (the shared start of chosen and rejected) must be split off first."
        raise ValueError(
            f"Row {row_id} has the keys {sorted(row)}, but a preference row needs prompt, chosen and rejected."
            + (hint if "prompt" not in row and "chosen" in row else "")
        )
    kinds = {column: type(row[column]).__name__ for column in COLUMNS}
    if set(kinds.values()) == {"str"}:
        return
    if set(kinds.values()) != {"list"}:
        raise ValueError(
            f"Row {row_id}: prompt, chosen and rejected must be three strings or three lists of messages, got {kinds}."
        )
    if not row["prompt"]:
        raise ValueError(f"Row {row_id}: prompt is an empty list. It needs at least one message of the user.")
    for column in COLUMNS[1:]:
        roles = [message.get("role") if isinstance(message, dict) else message for message in row[column]]
        if roles != ["assistant"]:
            raise ValueError(f"Row {row_id}: {column} must be one message of the assistant, got the roles {roles}.")


def _without_none(value):
    """Arrow gives every message all keys that any message has, filled with None: drop those."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _shared_length(first: Sequence, second: Sequence) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)


def _text(message: dict) -> str:
    """The text of a reply: a string, or the text parts of its content."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")

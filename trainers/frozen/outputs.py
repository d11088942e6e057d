"""Vectors of clips and earlier turns, computed once for all epochs.

In stages `dialogue` and `epo` the encoders, the Q-formers and the memory are frozen, so the vectors that they add to a
prompt do not change. These vectors are cached in main memory and replace the clips, which are no longer decoded or
encoded.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from ...data_prep.clip_digests import MEDIA_KINDS

logger = logging.getLogger(__name__)

GIB = 2**30


class FrozenOutputs:
    """Computes the outputs of the frozen parts for the prompt of each row.

    The entry of a row has `input_ids` (list of int) of the prompt, `video` and `audio` (queries, width) or None, and
    `memory` (utterances, width) or, without `keep_memory`, None and `memory_input_ids` (list of int). The entry of a
    row that is left out has only `left_out`, the reason. Vectors have the precision in which the language model reads
    them, so a run with them gives the same results as a run without.

    Args:
        processor: an [`EmpathicProcessor`].
        encode: a function of a row that returns (result of `processor.prepare` for its prompt, ""), or (None, the
            reason why the row is left out). It runs in the loader's workers.
        gib: maximum size of the entries in each process.
        feature_sizes: the sizes of a feature cache, as `processor.pad` takes them.
        keep_memory: whether the memory vectors are also kept.
    """

    def __init__(
        self,
        processor,
        encode: Callable[[dict], tuple[dict | None, str]],
        gib: float,
        feature_sizes=None,
        keep_memory: bool = True,
    ):
        self.processor, self.encode, self.gib, self.feature_sizes = processor, encode, gib, feature_sizes
        self.keep_memory = keep_memory
        tokens = [processor.video_token, processor.audio_token, *([processor.memory_token] if keep_memory else [])]
        self._placeholders = set(processor.tokenizer.convert_tokens_to_ids(tokens))

    def compute(self, model, rows: Sequence[dict], accelerator, batch_size: int, workers: int = 0) -> list[dict]:
        """Compute the entries of all rows. Each process encodes its share of the rows and gets all entries.

        Args:
            model: the model in its training wrapper.
            rows: a sequence of rows.
            accelerator: the accelerator of the run.
            batch_size: number of rows per batch in each process.
            workers: number of workers of the loader.

        Raises:
            ValueError: if a part is not frozen, or the entries need more than `gib`.
        """
        body = accelerator.unwrap_model(model)
        body = (body.get_base_model() if isinstance(body, PeftModel) else body).base_model
        check_frozen(body)
        dtype = body.get_input_embeddings().weight.dtype
        share = -(-len(rows) // accelerator.num_processes)
        mine = [min(accelerator.process_index * share + number, len(rows) - 1) for number in range(share)]
        loader = DataLoader(
            _Numbered(rows),
            batch_size,
            sampler=mine,
            num_workers=workers,
            collate_fn=self._collate,
            generator=torch.Generator(),  # does not advance the random state of the run
        )
        entries: list[dict | None] = [None] * len(rows)
        with _evaluating(model):
            for numbers, prepared, inputs in loader:
                inputs = {key: value.to(accelerator.device) for key, value in inputs.items()}
                with torch.no_grad(), accelerator.autocast():
                    outputs = model(**inputs, logits_to_keep=1, use_cache=False)
                for number, entry in gather_object(self._split(numbers, prepared, inputs, outputs, dtype)):
                    entries[number] = entry
                self._check_size(entries)
        size = sum(_size(entry) for entry in entries)
        if accelerator.is_main_process:
            logger.info("The vectors of %d rows take %.2f GiB in each process.", len(rows), size / GIB)
        return entries

    def _collate(self, rows: list[tuple[int, dict]]):
        """Return the rows' numbers, their prompts, and model inputs whose text has only the prompts' placeholders."""
        prepared = [self.encode(row) for _, row in rows]
        nothing = {"input_ids": [], "memory_input_ids": [], "video": None, "audio": None}
        eos = self.processor.tokenizer.eos_token_id
        short = []
        for prompt, _ in prepared:
            prompt = nothing if prompt is None else prompt
            kept = [token for token in prompt["input_ids"] if token in self._placeholders]
            remembered = prompt["memory_input_ids"] if self.keep_memory else []
            short.append({**prompt, "input_ids": [*kept, eos], "memory_input_ids": remembered})
        inputs = self.processor.pad(short, padding_side="right", all_modalities=True, feature_sizes=self.feature_sizes)
        prompts = [(prompt or nothing, "" if prompt else reason) for prompt, reason in prepared]
        prompts = [(prompt["input_ids"], prompt["memory_input_ids"], reason) for prompt, reason in prompts]
        return [number for number, _ in rows], prompts, dict(inputs)

    def _split(self, numbers, prompts, inputs, outputs, dtype) -> list[tuple[int, dict]]:
        """Split the outputs of a batch into (number, entry) of each row."""
        input_ids = inputs["input_ids"]
        video, audio, memory = (
            (input_ids == self.processor.tokenizer.convert_tokens_to_ids(token)).sum(1).tolist()
            for token in (self.processor.video_token, self.processor.audio_token, self.processor.memory_token)
        )
        vectors = [
            iter(_rows(states.detach().to("cpu", dtype), counts))
            for states, counts in (
                (outputs.video_vectors, video),
                (outputs.audio_vectors, audio),
                (outputs.memory_vectors, memory),
            )
        ]
        found = []
        for number, (ids, memory_ids, reason) in zip(numbers, prompts, strict=True):
            # Cloned, because a view would be sent, and kept in memory, with its whole tensor.
            seen, heard, remembered = (next(part).clone() for part in vectors)
            if not ids:
                found.append((number, {"left_out": reason}))
                continue
            entry = {"video": seen if len(seen) else None, "audio": heard if len(heard) else None}
            kept = {"memory": remembered} if self.keep_memory else {"memory": None, "memory_input_ids": memory_ids}
            found.append((number, {"input_ids": ids, **entry, **kept}))
        return found

    def _check_size(self, entries: list[dict | None]) -> None:
        done = [_size(entry) for entry in entries if entry is not None]
        needed = sum(done) / max(len(done), 1) * len(entries) / GIB
        if sum(done) > self.gib * GIB:
            raise ValueError(
                f"The vectors of {len(entries)} rows would need about {needed:.3g} GiB in each process, more than "
                f"cache_frozen_gib={self.gib}. Raise it or leave it out."
            )


def no_entry(input_ids: list[int]) -> dict:
    """Return the entry of a prompt without clips and memory."""
    return {"input_ids": input_ids, "video": None, "audio": None, "memory": None}


def stack_entries(entries: list[dict]) -> dict[str, torch.Tensor]:
    """Stack the vectors of a batch's rows, for `frozen_inputs`. A modality that no row has gets no key.

    Returns:
        `frozen_video`, `frozen_audio` (rows, queries, width) with `has_frozen_...` (rows,), and `frozen_memory` (rows,
        utterances, width), padded with zeros, with `frozen_memory_length` (rows,).
    """
    batch = {}
    for kind in MEDIA_KINDS:
        there = [entry[kind] is not None for entry in entries]
        if any(there):
            nothing = torch.zeros_like(entries[there.index(True)][kind])
            vectors = [nothing if entry[kind] is None else entry[kind] for entry in entries]
            batch |= {f"frozen_{kind}": torch.stack(vectors), f"has_frozen_{kind}": torch.tensor(there)}
    lengths = [0 if entry["memory"] is None else len(entry["memory"]) for entry in entries]
    if any(lengths):
        some = next(entry["memory"] for entry in entries if entry["memory"] is not None)
        memories = [some[:0] if entry["memory"] is None else entry["memory"] for entry in entries]
        batch |= {"frozen_memory": pad_sequence(memories, True), "frozen_memory_length": torch.tensor(lengths)}
    return batch


def frozen_inputs(batch: dict, rows: torch.Tensor | slice, packed: bool) -> dict[str, torch.Tensor]:
    """Make the model's inputs from the vectors of `stack_entries`.

    Args:
        batch: a batch with these vectors, among other keys.
        rows: the rows to use, in order.
        packed: whether the prompts of all rows are packed into one row of text.
    """
    inputs = {}
    for kind in MEDIA_KINDS:
        if f"frozen_{kind}" in batch:
            vectors, there = batch[f"frozen_{kind}"][rows], batch[f"has_frozen_{kind}"][rows]
            if there.any():
                inputs[f"{kind}_vectors"] = vectors[there]
    if "frozen_memory" in batch:
        memory, lengths = batch["frozen_memory"][rows], batch["frozen_memory_length"][rows]
        if lengths.any():
            there = torch.arange(memory.shape[1], device=lengths.device) < lengths[:, None]
            inputs["memory_vectors"] = memory[there][None] if packed else memory
    return inputs


def is_frozen_key(key: str) -> bool:
    """Whether a key of a batch comes from `stack_entries`."""
    return key.startswith(("frozen_", "has_frozen_"))


def check_frozen(body: nn.Module) -> None:
    """Raise a ValueError if a part of an [`EmpathicModel`] that computes vectors for the prompt is trained."""
    training = [
        name
        for name, parameter in body.named_parameters()
        if parameter.requires_grad and not name.startswith("language_model.")
    ]
    if training:
        raise ValueError(
            f"cache_frozen_gib cannot keep the vectors of a prompt, because these parameters are trained: "
            f"{training[0]} and {len(training) - 1} more. Freeze them, or leave cache_frozen_gib out."
        )


class _Numbered:
    """Rows together with their numbers."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, dict]:
        return number, self.rows[number]


@contextmanager
def _evaluating(model: nn.Module):
    """A context with the model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _rows(states: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    """Split vectors (..., width) among the rows. The last part belongs to no row: absent clips are encoded too."""
    flat = states.flatten(0, -2)
    return flat.split([*counts, len(flat) - sum(counts)])


def _size(entry: dict) -> int:
    return sum(value.nbytes for value in entry.values() if torch.is_tensor(value))

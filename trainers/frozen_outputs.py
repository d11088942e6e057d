"""Vectors of clips and earlier turns, computed once for all epochs.

In stages `dialogue` and `epo` the encoders, the Q-formers and the memory are frozen: the vectors that they put into a
prompt do not change. Kept in main memory, they take the place of the clips, which are then neither decoded nor encoded.
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

logger = logging.getLogger(__name__)

GIB = 2**30
KINDS = ("video", "audio")


class FrozenOutputs:
    """What the frozen parts make of each row's prompt, by the row's number.

    An entry has `input_ids` (list of int) of the prompt, `video` and `audio` (queries, width) or None, and `memory`
    (utterances, width) or, if it is not kept, None and `memory_input_ids` (list of int); or only `left_out`, why the
    row has none. The vectors are in the precision in which the language model reads them, so a run with them is that
    without.

    Args:
        processor: an [`EmpathicProcessor`].
        encode: a row -> (what `processor.prepare` gave for its prompt, ""), or (None, why it is left out). It runs in
            the loader's workers.
        gib: how much the entries may take in each process.
        feature_sizes: of a feature cache, as `processor.pad` takes them.
        keep_memory: whether the memory's vectors are kept too.
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
        """The entries of all rows; each process encodes its share of them, and all get all.

        Args:
            model: the model as it trains, in its wrapper.
            rows: can be indexed and have a length.
            accelerator: of the run.
            batch_size: rows at a time in each process.
            workers: of the loader.

        Raises:
            ValueError: a part is not frozen, or the entries take more than `gib`.
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
            generator=torch.Generator(),  # the run's own random numbers are left alone
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
        """Rows -> their numbers, prompts, and the model's inputs of a text with nothing but their placeholders."""
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
        """Row by row what a forward gave for a batch."""
        input_ids = inputs["input_ids"]
        video, audio, memory = (
            (input_ids == self.processor.tokenizer.convert_tokens_to_ids(token)).sum(1).tolist()
            for token in (self.processor.video_token, self.processor.audio_token, self.processor.memory_token)
        )
        vectors = [
            iter(_rows(states.detach().to("cpu", dtype), counts))
            for states, counts in (
                (outputs.video_hidden_states, video),
                (outputs.audio_hidden_states, audio),
                (outputs.memory_hidden_states, memory),
            )
        ]
        found = []
        for number, (ids, memory_ids, reason) in zip(numbers, prompts, strict=True):
            # Cloned: a part of a tensor is sent, and kept, with the whole.
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
                f"The vectors of {len(entries)} rows would take about {needed:.3g} GiB in each process, more than "
                f"cache_frozen_gib={self.gib}. Raise it or leave it out."
            )


def no_entry(input_ids: list[int]) -> dict:
    """The entry of a prompt without clips and memory."""
    return {"input_ids": input_ids, "video": None, "audio": None, "memory": None}


def stack_entries(entries: list[dict]) -> dict[str, torch.Tensor]:
    """The vectors of a batch's rows, for `frozen_inputs`; nothing for a modality that no row has.

    `frozen_video`, `frozen_audio` (rows, queries, width) beside `has_frozen_...` (rows,), and `frozen_memory` (rows,
    utterances, width), zero past a row's last, beside `frozen_memory_length` (rows,).
    """
    batch = {}
    for kind in KINDS:
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
    """The model's inputs for the vectors of `stack_entries`.

    Args:
        batch: holds them, beside whatever else.
        rows: which of its rows, in which order.
        packed: all rows' prompts stand in one row of text.
    """
    inputs = {}
    for kind in KINDS:
        if f"frozen_{kind}" in batch:
            vectors, there = batch[f"frozen_{kind}"][rows], batch[f"has_frozen_{kind}"][rows]
            if there.any():
                inputs[f"{kind}_embeds"] = vectors[there]
    if "frozen_memory" in batch:
        memory, lengths = batch["frozen_memory"][rows], batch["frozen_memory_length"][rows]
        if lengths.any():
            there = torch.arange(memory.shape[1], device=lengths.device) < lengths[:, None]
            inputs["memory_embeds"] = memory[there][None] if packed else memory
    return inputs


def is_frozen_key(key: str) -> bool:
    """Whether a batch's entry is one of `stack_entries`."""
    return key.startswith(("frozen_", "has_frozen_"))


def check_frozen(body: nn.Module) -> None:
    """ValueError if a part that makes vectors of the prompt trains: an [`EmpathicModel`]'s."""
    training = [
        name
        for name, parameter in body.named_parameters()
        if parameter.requires_grad and not name.startswith("language_model.")
    ]
    if training:
        raise ValueError(
            f"The vectors of a prompt cannot be kept (cache_frozen_gib), because what makes them trains: {training[0]} "
            f"and {len(training) - 1} more. Freeze them, or leave cache_frozen_gib out."
        )


class _Numbered:
    """Rows with their numbers."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[int, dict]:
        return number, self.rows[number]


@contextmanager
def _evaluating(model: nn.Module):
    """Within, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _rows(states: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, ...]:
    """Vectors (..., width), divided among the rows. The last belong to none: a clip is encoded where there is none."""
    flat = states.flatten(0, -2)
    return flat.split([*counts, len(flat) - sum(counts)])


def _size(entry: dict) -> int:
    return sum(value.nbytes for value in entry.values() if torch.is_tensor(value))

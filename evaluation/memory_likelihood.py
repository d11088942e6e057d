"""How much the memory vectors of utterances tell a language model about them."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from ..trainers.losses import IGNORE_INDEX
from ..trainers.samples import StageCollator, rebuild_sample


@torch.inference_mode()
def likelihood(model, processor, runs: Sequence[list[dict]], batch_size: int = 32) -> dict[str, float] | None:
    """
    Compute how likely the texts of runs of utterances are, given their memory vectors and given those of others.

    The difference is what the vectors tell. It also shows what a memory has learned that rebuilds nothing yet.

    Args:
        model, processor: an `EmpathicForConditionalGeneration`, or a PEFT model around it, and its `EmpathicProcessor`.
        runs: lists of turn rows.

    Returns:
        The mean negative log-likelihoods in nats per token: `own`, and `other`, with the vectors of another run that
        has as many. None if no two runs of a batch have as many vectors.
    """
    collator = StageCollator(processor, clips=False)
    samples = [{**rebuild_sample(run), "history": "memory", "seed": None} for run in runs]
    sums, tokens = {"own": 0.0, "other": 0.0}, 0
    model.eval()
    for start in tqdm(range(0, len(samples), batch_size), "likelihood", leave=False):
        batch = collator(samples[start : start + batch_size])
        inputs = {key: value.to(model.device) for key, value in batch.items() if torch.is_tensor(value)}
        labels, read = inputs.pop("labels")[:, 1:], inputs["memory_input_ids"] == processor.mem_token_id
        others = _others(read.sum(1).tolist())
        there = labels != IGNORE_INDEX
        there[[row for row, other in enumerate(others) if other == row]] = False
        columns = there.any(0).nonzero().squeeze(1)
        if not len(columns):
            continue
        chosen = there[:, columns]
        targets = labels[:, columns][chosen]
        for name, order in (("own", list(range(len(others)))), ("other", others)):
            memory = {key: inputs[key][order] for key in ("memory_input_ids", "memory_attention_mask")}
            logits = model(**{**inputs, **memory}, logits_to_keep=columns).logits[chosen].float()
            sums[name] += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
    return {name: total / tokens for name, total in sums.items()} if tokens else None


def _others(counts: Sequence[int]) -> list[int]:
    """For each row the next one, in a circle, that has the same count; the row itself if there is none."""
    found = list(range(len(counts)))
    for count in set(counts):
        rows = [row for row, own in enumerate(counts) if own == count]
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            found[row] = other
    return found

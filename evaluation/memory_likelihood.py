"""How much the memory vectors of utterances tell a language model about them."""

import tempfile
from collections.abc import Sequence

from tqdm import tqdm

from ..trainers.samples import rebuild_sample
from .contrast.likelihood import ReplyScorer


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
    sums, tokens = {"own": 0.0, "other": 0.0}, 0
    with tempfile.TemporaryDirectory() as folder:
        scorer = ReplyScorer(model, processor, folder)
        for start in tqdm(range(0, len(runs), batch_size), "likelihood", leave=False):
            samples = [rebuild_sample(run) for run in runs[start : start + batch_size]]
            prepared = [processor.prepare(sample["messages"], "memory") for sample in samples]
            others = _others([prompt["memory_input_ids"].count(processor.mem_token_id) for prompt in prepared])
            rows = [row for row, other in enumerate(others) if other != row]
            if not rows:
                continue
            targets = [samples[row]["target"] for row in rows]
            for name, reads in (("own", rows), ("other", [others[row] for row in rows])):
                memories = ({"memory_input_ids": prepared[read]["memory_input_ids"]} for read in reads)
                prompts = [prepared[row] | memory for row, memory in zip(rows, memories, strict=True)]
                scores = scorer.scores(prompts, [[target] for target in targets])
                sums[name] -= sum(score for [(score, _)] in scores)
            tokens += sum(count for [(_, count)] in scores)
    return {name: total / tokens for name, total in sums.items()} if tokens else None


def _others(counts: Sequence[int]) -> list[int]:
    """For each row the next one, in a circle, that has the same count; the row itself if there is none."""
    found = list(range(len(counts)))
    for count in set(counts):
        rows = [row for row, own in enumerate(counts) if own == count]
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            found[row] = other
    return found

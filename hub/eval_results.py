"""The `.eval_results/*.yaml` of a model's repository, from which the Hub shows results and leaderboards.

The format is that of huggingface_hub's `EvalResultEntry`. It names a benchmark by the id of its data set on the Hub, so
results on a local data set are only in the card and its `model-index`.
"""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from .model_card import evaluations, read_record, version_text

EVAL_RESULTS = ".eval_results/empathic.yaml"


def eval_results(folder: Path) -> dict[str, bytes]:
    """Return the file of a model or stage folder, path -> content; empty without results on data of the Hub."""
    record = read_record(str(folder))
    entries = []
    for result in evaluations(record["runs"], record.get("results")):
        if result.dataset_split == "train" or "/" not in result.dataset_type:
            continue
        entries.append(
            EvalResultEntry(
                dataset_id=result.dataset_type,
                task_id=re.sub(r"[^a-z0-9]+", "_", str(result.metric_name).lower()).strip("_"),
                value=result.metric_value,
                notes=f"{result.metric_name}, split {result.dataset_split}, with {version_text(record['runs'])}",
            )
        )
    if not entries:
        return {}
    content = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {EVAL_RESULTS: content.encode()}

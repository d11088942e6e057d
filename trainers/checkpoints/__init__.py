"""The output folders of stages: loading, saving, resuming, merging and pushing."""

from .stage_folder import StageRecord, load_model, merge, new_tensors

__all__ = ["StageRecord", "load_model", "merge", "new_tensors"]

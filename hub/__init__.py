"""Push data sets, models, metrics and Spaces to the Hub."""

from .client import PushError, push_files
from .data_sets import push_dataset
from .kinds import kind_of

__all__ = ["PushError", "kind_of", "push_dataset", "push_files"]

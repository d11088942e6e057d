"""Training: the five stages, and Emotional Preference Optimization for any preference rows."""

from importlib import import_module

_MODULES = {"EPOConfig": "epo_config", "EPOTrainer": "epo_trainer", "epo_loss": "losses"}

__all__ = ["EPOConfig", "EPOTrainer", "epo_loss"]


def __getattr__(name: str):
    # Imported on first use, so that the command line need not wait for the trainer's imports.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

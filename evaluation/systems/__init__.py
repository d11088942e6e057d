"""The systems that can reply to a conversation: our model, other transformers models, and endpoints."""

__all__ = ["open_system"]


def __getattr__(name: str):
    # Imported on first use, so that one system does not need the imports of all.
    if name in __all__:
        from .open import open_system

        return open_system
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""
The chatbot of a Space on ZeroGPU, where a GPU belongs to a worker process for the time of one call.

Import this module before any other of the page: ZeroGPU's package `spaces` must come before torch. On other hardware,
and without that package, `chatbot_class` returns the ordinary `Chatbot`.
"""

import os
from collections.abc import Iterator
from contextlib import closing, suppress

spaces = None
with suppress(ImportError):  # only a Space on ZeroGPU has the package
    import spaces  # pyright: ignore[reportMissingImports]

from .session import Chatbot, ShownTurn, Visitor  # noqa: E402

SECONDS = 60  # how long a GPU is asked for; a shorter time has precedence, and a call that takes longer is ended


def chatbot_class() -> type[Chatbot]:
    """Return the class for this hardware."""
    on_zero_gpu = spaces is not None and os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
    return ZeroGPUChatbot if on_zero_gpu else Chatbot


class ZeroGPUChatbot(Chatbot):
    """
    A `Chatbot` whose model runs in ZeroGPU's worker processes. Such a process has a copy of this object from the time
    of its start, so it is sent all that a turn needs: the conversation, from which it encodes the memory anew. The
    sessions of visitors are not cached.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        on_gpu = spaces.GPU(duration=SECONDS)
        self._states_on_gpu, self._emotions_on_gpu = on_gpu(self._states), on_gpu(super().emotions)

    def _states(self, conversation, text, clips, compare, another, memory) -> Iterator[ShownTurn]:
        yield from super()._answer(Visitor(), conversation, text, clips, compare, another, memory)

    def _answer(self, visitor, conversation, text, clips, compare, another, memory) -> Iterator[ShownTurn]:
        turn = None
        with closing(self._states_on_gpu(conversation, text, clips, tuple(compare), another, memory)) as states:
            for turn in states:
                yield turn
        visitor.last = (turn, clips)

    def emotions(self, text: str, clips: dict[str, dict]) -> dict[str, float] | None:
        return self._emotions_on_gpu(text, clips)

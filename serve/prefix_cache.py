"""A bounded store of what conversations share: pieces of memory and of the language model's key-value cache."""

import time
from collections import OrderedDict
from collections.abc import Hashable
from hashlib import blake2b
from typing import Any

import torch

OVERHEAD = 1000  # bytes of Python objects that a piece takes in addition to its tensors


def digest(*parts: bytes) -> bytes:
    """Return a digest of a sequence of byte strings; two sequences have the same digest only if they are equal."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


class PrefixCache:
    """
    Immutable pieces by key, at most `max_bytes` of them; the least recently used piece is evicted first.

    The key of a piece is a digest of everything that it was computed from. A piece therefore serves every conversation
    that begins with the same messages, and one that was evicted is computed again with the same result.

    Args:
        max_bytes: the maximum size of all pieces; 0 keeps nothing.
        max_seconds: `sweep` evicts the pieces that were not used for this time; None keeps them.

    Attributes:
        size: the size of all pieces in bytes.
        evictions: the number of pieces evicted so far.
    """

    def __init__(self, max_bytes: int, max_seconds: float | None = None):
        self.max_bytes, self.max_seconds, self.size, self.evictions = max_bytes, max_seconds, 0, 0
        # The piece, its size, and when it was used last.
        self._pieces: OrderedDict[Hashable, tuple[Any, int, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._pieces

    def get(self, key: Hashable) -> Any:
        """Return a piece and count it as used; None if it is not here."""
        if key not in self._pieces:
            return None
        self._use(key)
        return self._pieces[key][0]

    def put(self, key: Hashable, piece, tensors: list[torch.Tensor]) -> None:
        """Keep a piece, whose size is that of its `tensors`. Nothing may write into them any more."""
        if key in self._pieces:
            self._use(key)
            return
        size = OVERHEAD + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size > self.max_bytes:
            return
        while self.size + size > self.max_bytes:
            self._evict()
        self._pieces[key] = piece, size, time.monotonic()
        self.size += size

    def sweep(self) -> None:
        """Evict what was not used for `max_seconds`."""
        if self.max_seconds is not None:
            oldest = time.monotonic() - self.max_seconds
            while self._pieces and next(iter(self._pieces.values()))[2] < oldest:
                self._evict()

    def _use(self, key: Hashable) -> None:
        piece, size, _ = self._pieces[key]
        self._pieces[key] = piece, size, time.monotonic()
        self._pieces.move_to_end(key)

    def _evict(self) -> None:
        _, (_, freed, _) = self._pieces.popitem(last=False)
        self.size -= freed
        self.evictions += 1

    def clear(self) -> None:
        """Drop all pieces."""
        self._pieces.clear()
        self.size = 0

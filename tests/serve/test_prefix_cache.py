"""The bounded store of what conversations share."""

import time

import torch

from empathic.serve.prefix_cache import OVERHEAD, PrefixCache, digest


def test_the_least_recently_used_piece_is_evicted_first():
    tensor = torch.zeros(250)  # 1,000 bytes
    cache = PrefixCache(3 * (OVERHEAD + 1000))
    for name in "abc":
        cache.put(name, name.upper(), [tensor])
    assert cache.get("a") == "A"
    cache.put("d", "D", [tensor])
    assert [name for name in "abcd" if name in cache] == ["a", "c", "d"]
    cache.put("c", "other", [tensor])  # counts as used, and keeps the piece that is there
    cache.put("e", "E", [tensor])
    assert [name for name in "abcde" if name in cache] == ["c", "d", "e"] and cache.get("c") == "C"
    assert cache.size == 3 * (OVERHEAD + 1000) and cache.evictions == 2


def test_the_size_never_exceeds_the_limit():
    cache = PrefixCache(10_000)
    for number in range(300):
        cache.put(number, None, [torch.zeros(number)])
        assert cache.size <= 10_000
    assert 0 < len(cache) < 10 and 299 in cache
    cache.put("large", None, [torch.zeros(10_000)])
    assert "large" not in cache and len(cache) > 0
    cache.clear()
    assert len(cache) == cache.size == 0


def test_pieces_without_tensors_are_bounded_too():
    cache = PrefixCache(100 * OVERHEAD)
    for number in range(1000):
        cache.put(number, None, [])
    assert len(cache) == 100


def test_a_digest_depends_on_where_parts_end():
    assert len({digest(b"ab", b"c"), digest(b"a", b"bc"), digest(b"abc"), digest(b"abc", b"")}) == 4
    assert digest(b"ab", b"c") == digest(b"ab", b"c")


def test_a_sweep_evicts_what_was_not_used_for_a_while():
    tensor = torch.zeros(10)
    cache, endless = PrefixCache(10**6, max_seconds=0.2), PrefixCache(10**6)
    for name in "ab":
        cache.put(name, name, [tensor])
        endless.put(name, name, [tensor])
    cache.sweep()
    assert len(cache) == 2
    time.sleep(0.3)
    cache.get("a")  # counts as used
    cache.sweep()
    endless.sweep()
    assert "a" in cache and "b" not in cache and len(endless) == 2 and cache.evictions == 1

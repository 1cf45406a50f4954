"""The cache store: bytes are counted, the budget is kept, the longest unused stream goes first."""

import pytest
import torch

from omnifx.errors import CacheError
from omnifx.store import CacheStore, StreamCache, default_budget


def test_a_storage_that_two_cuts_share_counts_once() -> None:
    whole = torch.zeros(4, 8)
    cache = StreamCache(cuts={"a": whole[:2], "b": whole[2:]}, noise={0: torch.zeros(2)})

    assert cache.num_bytes == 4 * 8 * 4 + 2 * 4


def test_the_longest_unused_stream_is_evicted_and_emptied() -> None:
    store = CacheStore(budget=100)
    caches = {key: store.admit(key, 40) for key in (1, 2)}
    for cache in caches.values():
        cache.cuts["a"] = torch.zeros(10)
    store.touch(1)

    store.admit(3, 40)

    assert [store.holds(key) for key in (1, 2, 3)] == [True, False, True]
    assert caches[2].cuts == {}
    assert (store.evictions, store.reserved_bytes, store.held_bytes) == (1, 80, 40)


def test_a_large_stream_evicts_as_many_as_it_needs() -> None:
    store = CacheStore(budget=100)
    for key in range(4):
        store.admit(key, 25)

    store.admit(9, 60)

    assert [key for key in (0, 1, 2, 3, 9) if store.holds(key)] == [3, 9]
    assert store.peak_bytes == 100


def test_what_can_never_fit_is_refused_and_evicts_nobody() -> None:
    store = CacheStore(budget=100)
    store.admit(1, 100)

    with pytest.raises(CacheError, match=r"need 101 bytes, but cache_budget is 100\. Raise cache_budget"):
        store.admit(2, 101)

    assert store.holds(1)


def test_released_caches_are_empty_and_may_be_released_again() -> None:
    store = CacheStore(budget=100)
    cache = store.admit(1, 10)
    cache.cuts["a"], cache.noise[0] = torch.zeros(1), torch.zeros(1)

    store.release(1)
    store.release(1)
    store.touch(1)

    assert not store.holds(1)
    assert cache.num_bytes == store.held_bytes == store.reserved_bytes == 0


def test_the_default_budget_is_a_share_of_the_memory() -> None:
    assert default_budget(torch.device("cpu")) > 2**26

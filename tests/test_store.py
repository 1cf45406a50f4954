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


def test_the_last_values_of_a_cut_move_on_by_pointer() -> None:
    cache = StreamCache()
    values = [torch.full((4,), float(k)) for k in range(5)]

    for step, value in enumerate(values):
        cache.push("a", value, step=2 * step, terms=3)

    assert [t.data_ptr() for t in (cache.cuts["a"], *cache.past["a"])] == [v.data_ptr() for v in values[:1:-1]]
    assert cache.steps["a"] == (8, 6, 4)
    assert cache.num_bytes == 3 * 4 * 4


def test_room_is_made_before_the_next_value_comes() -> None:
    cache = StreamCache()
    for step in range(3):
        cache.push("a", torch.zeros(4), step=step, terms=2)

    cache.make_room("a", 2)

    assert cache.num_bytes == 4 * 4  # the one that moved on; the other is gone
    cache.push("a", torch.ones(4), step=7, terms=2)
    assert cache.steps["a"] == (7, 2)


def test_a_value_that_never_came_leaves_no_step_behind() -> None:
    cache = StreamCache()
    cache.push("a", torch.zeros(4), step=0, terms=2)
    cache.make_room("a", 2)  # and the step failed

    cache.make_room("a", 2)
    cache.push("a", torch.ones(4), step=2, terms=2)

    assert "a" in cache.cuts
    assert cache.steps["a"] == (2, 0)
    cache.forget("a")
    assert (cache.num_bytes, cache.steps, cache.past) == (0, {}, {})


def test_the_default_budget_is_a_share_of_the_memory() -> None:
    assert default_budget(torch.device("cpu")) > 2**26

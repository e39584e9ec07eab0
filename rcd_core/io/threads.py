"""Many small requests to storage at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

NUM_THREADS = 32  # a request to an object store takes milliseconds of waiting
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The results of `function` in the order of `items`, computed by NUM_THREADS threads. The first error ends it."""
    pool = ThreadPoolExecutor(NUM_THREADS, "storage")
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)

"""Process many items with one thread per processor."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from fastdiff.runtime.threads import one_thread

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with the amount done and the total."""


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Yield ``function(item)`` for each item, in order. The items are taken in the caller's thread."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads, thread_name_prefix="decode", initializer=one_thread) as pool:
        waiting = iter(items)
        # Results wait here for their turn; the window limits their number.
        window = deque(pool.submit(function, item) for item in islice(waiting, 4 * threads))
        while window:
            yield window.popleft().result()
            window.extend(pool.submit(function, item) for item in islice(waiting, 1))

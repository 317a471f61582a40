"""Thread that fetches packs ahead of training and records which ones it holds."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

# Micro-batches that each loader worker prepares ahead.
WORKER_AHEAD = 2
# Packs that the training process takes from its workers in advance, so that their files travel early.
TAKEN_AHEAD = 2


class Prefetcher:
    """Iterator that reads up to `depth` items ahead in a thread of its own.

    Args:
        items: source of items; read only in the thread.
        key_of: key of an item, from which it can be made again.
        work: function that the thread applies to each item; by default none.
        depth: maximum number of results kept ready.

    An exception of `items` or `work` is raised in place of the result.
    """

    def __init__(
        self,
        items: Iterator[Any],
        key_of: Callable[[Any], Any] = lambda _: None,
        work: Callable[[Any], Any] = lambda item: item,
        depth: int = 1,
    ):
        self._items, self._key_of, self._work = items, key_of, work
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._lock = threading.Lock()
        self._keys: deque[Any] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._room.acquire()
            if self._stopped:
                return
            try:
                with self._lock:
                    item = next(self._items)
                    self._keys.append(self._key_of(item))
                self._ready.put((self._work(item), None))
            except BaseException as error:
                self._ready.put((None, error))
                return

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        result, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # for the next call
            raise error
        # Without the lock, which the thread holds while it waits for the next item. Only the thread that takes
        # items also calls `while_paused`, so that no key goes while it is read there.
        self._keys.popleft()
        self._room.release()
        return result

    @property
    def ready(self) -> int:
        """Number of results not taken yet."""
        return self._ready.qsize()

    def while_paused(self, save: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Result of `save()`, called while the thread reads nothing, and the keys of all items not taken yet."""
        with self._lock:
            return save(), list(self._keys)

    def close(self) -> None:
        """Stop the thread; items not taken are lost."""
        self._stopped = True
        self._room.release()
        self._thread.join(timeout=60)

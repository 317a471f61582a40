"""A thread that finishes packs ahead of training, and knows which ones it has on their way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


class Ahead:
    """Iterator that works ``depth`` items ahead in a thread of its own.

    Args:
        items: where items come from; read in the thread only.
        key_of: name of an item, by which it can be made again.
        work: what the thread does with an item; by default it only fetches it.
        depth: results kept ready.

    An exception of ``items`` or ``work`` comes up where the result would have.
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
        self._thread = threading.Thread(target=self._run, name="decode-ahead", daemon=True)
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

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        result, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # for whoever asks again
            raise error
        with self._lock:
            self._keys.popleft()
        self._room.release()
        return result

    @property
    def ready(self) -> int:
        """Results that no one has taken yet."""
        return self._ready.qsize()

    def at_rest(self, save: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """``save()`` while the thread reads nothing, and the keys of the items that no one has taken."""
        with self._lock:
            return save(), list(self._keys)

    def close(self) -> None:
        """End the thread; items on their way are lost."""
        self._stopped = True
        self._room.release()
        self._thread.join(timeout=60)

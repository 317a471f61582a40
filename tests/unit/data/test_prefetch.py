"""The thread that reads ahead; what it holds when a run stops is in tests/parallel/test_energon.py."""

import threading
from collections.abc import Iterator

from megatron_internvlx.data.prefetch import Prefetcher


def test_a_ready_item_is_there_although_the_next_one_is_waited_for() -> None:
    asked, answered = threading.Event(), threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        asked.set()
        answered.wait()
        yield 2

    items = Prefetcher(slow(), depth=2)
    assert asked.wait(20)
    taken: list[int] = []
    taking = threading.Thread(target=lambda: taken.append(next(items)), daemon=True)
    taking.start()
    taking.join(20)
    assert taken == [1]
    answered.set()
    assert next(items) == 2
    items.close()


def test_keys_of_what_is_read_and_not_taken() -> None:
    items = Prefetcher(iter("abcd"), key_of=str.upper, depth=2)
    assert next(items) == "a"
    while items.ready < 2:
        pass
    assert items.while_paused(lambda: "position") == ("position", ["B", "C"])
    items.close()

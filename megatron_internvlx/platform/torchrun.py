"""What torchrun does not tell whoever calls it."""

from __future__ import annotations

from typing import Any


def keep_exit_codes() -> dict[int, int | None]:
    """Exit code of each local rank of the newest start, once torchrun has ended its ranks; None for one that lives on.

    After a signal of its own torchrun raises SignalException without looking at how the ranks ended, and nothing
    else (events, logs, failures) has it. Seen on torch 2.13.
    """
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    codes: dict[int, int | None] = {}
    # A second call of the same process (tests) wraps the original again.
    original = getattr(SubprocessContext._close, "__wrapped__", SubprocessContext._close)

    def close(context: Any, *args: Any, **kwargs: Any) -> None:
        original(context, *args, **kwargs)
        codes.clear()
        codes.update({rank: one.proc.poll() for rank, one in context.subprocess_handlers.items()})

    close.__wrapped__ = original  # type: ignore[attr-defined]
    SubprocessContext._close = close  # type: ignore[method-assign, assignment]
    return codes

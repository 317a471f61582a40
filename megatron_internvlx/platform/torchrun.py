"""Exit codes of the ranks, which torchrun does not report to its caller."""

from __future__ import annotations

from typing import Any


def record_exit_codes() -> dict[int, int | None]:
    """Record the exit code of each local rank when torchrun ends the ranks; None for a rank that is still running.

    The returned dictionary is filled later, for the newest start. After a signal torchrun raises SignalException
    without checking how the ranks ended, and no event, log or failure has the codes. Seen on torch 2.13.
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

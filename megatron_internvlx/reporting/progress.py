"""A one-line progress display for people at a terminal; silent wherever the output is a file."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm


class ProgressBar:
    """Steps done, time left, loss, speed and accuracy on one line of `stream` (stderr by default).

    Draws only if the stream is a terminal. The bar appears with the first `update`; a run resumed at step
    n starts there. Also a context manager.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self.enabled = self._stream.isatty()
        self._bar: Any = None
        self._accuracy: float | None = None

    def update(
        self,
        step: int,
        total: int,
        *,
        loss: float | None = None,
        tokens_per_s: float | None = None,
        accuracy: float | None = None,
        left: str | None = None,
    ) -> None:
        """Show that `step` of `total` steps are done.

        Args:
            step: number of steps done.
            total: number of steps of the run.
            loss: of the latest log interval.
            tokens_per_s: of the latest log interval.
            accuracy: share of right answers, 0 to 1; it stays shown until the next one.
            left: text of the time left.
        """
        if not self.enabled:
            return
        if self._bar is None:
            self._bar = tqdm(
                total=total,
                initial=max(0, step - 1),
                desc="training",
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}",
            )
        if accuracy is not None:
            self._accuracy = accuracy
        shown = [f"{left} left"] if left else []
        if loss is not None:
            shown.append(f"loss {loss:.3f}")
        if tokens_per_s is not None:
            shown.append(f"{tokens_per_s:,.0f} tokens/s")
        if self._accuracy is not None:
            shown.append(f"accuracy {self._accuracy:.1%}")
        self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update(step - self._bar.n)

    def write(self, line: str) -> None:
        """Print a line above the bar; as plain text where no bar is shown."""
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        """End the line; a later update starts a new one."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

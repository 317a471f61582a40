"""Loss curve and picture of a run, written by the rank that knows the losses."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_internvlx.megatron_settings import Progress
from megatron_internvlx.reporting.answers import AnswerBook
from megatron_internvlx.reporting.curve import Curve


class Report:
    """Loss and accuracy by step, and the picture of them.

    Args:
        progress: of the run, with the checkpoint that was loaded.
        folder: the `--save` directory, for the curve; None: it is not kept for a later start.
        path: file of the picture; None: no picture.
        book: answers of the latest evaluation; None without held-out data.
        writes: whether this rank writes files.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path | None,
        path: str | None,
        book: AnswerBook | None,
        *,
        writes: bool,
    ) -> None:
        self.progress, self.folder, self.book, self.writes = progress, folder, book, writes
        self.path = Path(path) if path else None
        self._curve: Curve | None = None
        self.left = ""
        """Text of the time left, for the title of the picture; empty if it is not known or the run has ended."""

    @property
    def curve(self) -> Curve:
        """Curve so far, earlier starts included. Read it only after Megatron has loaded its checkpoint."""
        if self._curve is None:
            self._curve = Curve()
            load, step = self.progress.loaded_from, self.progress.loaded_step
            if load and step and self.writes:
                self._curve.load_earlier(Path(load), step)
        return self._curve

    @property
    def accuracy(self) -> float | None:
        """Share of right answers in the latest evaluation, 0 to 1; None before the first."""
        return self.curve.accuracies[-1][1] if self.curve.accuracies else None

    def save_curve(self) -> None:
        """Write the curve for a later start; called with every checkpoint."""
        if self.folder is not None and self.writes:
            self.curve.save(self.folder)

    def draw(self) -> bool:
        """Write the picture; returns whether it was written."""
        losses = self.curve.losses
        if not (self.writes and self.path and losses):
            return False  # an evaluation before the first log interval has ended, for instance
        # matplotlib takes a second to import and is needed on one rank only.
        from megatron_internvlx.reporting.picture import choose_examples, kind_accuracies, write_report

        caption = f"loss {losses[0][1]:.3f} -> {losses[-1][1]:.3f}"
        if self.accuracy is not None:
            caption += f", held-out answers right {self.accuracy:.1%}"
        answers = self.book.predictions() if self.book else []
        try:
            write_report(
                self.path,
                losses=losses,
                accuracies=self.curve.accuracies,
                kinds=kind_accuracies(answers),
                examples=choose_examples(answers),
                title=f"InternVL-X: {losses[-1][0]} steps" + (f", {self.left} left" if self.left else ""),
                caption=caption,
            )
        except OSError as error:  # a full disk, for instance: training continues
            print(f"{self.path} could not be written: {error}", file=sys.stderr, flush=True)
            return False
        return True

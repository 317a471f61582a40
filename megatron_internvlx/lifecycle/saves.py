"""Guard of Megatron's checkpoints: no save without room on the disk, and no rank that waits for a failed save."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_internvlx.exit_codes import SAVE_FAILED
from megatron_internvlx.lifecycle import resume
from megatron_internvlx.lifecycle.resume import Unsaved
from megatron_internvlx.lifecycle.setup import RunSetup


class GuardedSaves:
    """Wraps Megatron's `save_checkpoint`.

    Args:
        setup: the run's directory and ranks.
        failed: called with the reason on the rank whose save failed, before its process ends.
        saved: called on every rank after each checkpoint, with its seconds.
    """

    def __init__(
        self,
        setup: RunSetup,
        failed: Callable[[str], None],
        saved: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.setup, self.failed, self.saved = setup, failed, saved
        self.saving = False
        """Whether a checkpoint is being written now."""
        self.unsaved: Unsaved | None = None
        """The last step that was to be saved, if the disk had no room for it."""

    def install(self) -> GuardedSaves:
        """Replace Megatron's function by the guarded one; in a later run of this process, guard the original again."""
        import megatron.training.training as training

        original = getattr(training.save_checkpoint, "__wrapped__", training.save_checkpoint)
        training.save_checkpoint = self.guard(original)
        return self

    def guard(self, save_checkpoint: Callable[..., None]) -> Callable[..., None]:
        """Wrap `save_checkpoint`: skip it if the disk has no room, end the process if it fails."""

        def save(iteration: int, *args: Any, **kwargs: Any) -> None:
            if not self._has_room(iteration):
                return
            self.saving, start = True, time.monotonic()
            try:
                save_checkpoint(iteration, *args, **kwargs)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # torch's CheckpointException is no Exception
                self._end_process(iteration, error)
            self.saving = False
            self.saved(time.monotonic() - start)

        save.__wrapped__ = save_checkpoint  # type: ignore[attr-defined]
        return save

    def _has_room(self, iteration: int) -> bool:
        """Whether the disk holds another checkpoint as large as the last; all ranks agree."""
        if self.setup.save is None:
            return True
        lack: list[str | None] = [None]
        if dist.get_rank() == 0:
            lack = [resume.shortage(self.setup.save)]
            if lack[0]:
                print(
                    f"step {iteration}: no checkpoint: {lack[0]}; training continues, make room",
                    file=sys.stderr,
                    flush=True,
                )
        dist.broadcast_object_list(lack, src=0)
        # Megatron saves at the last step of a run: if this is set when the run ends, that step was not saved.
        self.unsaved = Unsaved(iteration, lack[0]) if lack[0] else None
        return self.unsaved is None

    def _end_process(self, iteration: int, error: BaseException) -> None:
        """Record the failure and exit at once: the other ranks wait in the save, and torchrun ends them."""
        # torch's file writer hides the reason, which is most often a full disk.
        save = self.setup.save
        left = f"{shutil.disk_usage(save).free / 1e9:.2f} GB left on the disk" if save else ""
        self.failed(
            f"saving at step {iteration} failed, {left}: {root_cause(error)!r}; earlier checkpoints are intact"
        )
        os._exit(SAVE_FAILED)


def root_cause(error: BaseException) -> BaseException:
    """Follow a chain of exceptions to its start: Megatron wraps a full disk several times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error

"""Exit codes of every command, once: docs/commands.md shows this table, and tests compare the two."""

DONE = 0
FAILED = 1
MISTAKE = 2
SAVE_FAILED = 74
AGAIN = 75
STOP = 76
IN_USE = 77
INTERRUPTED = 130
TERMINATED = 143

MEANINGS = {
    DONE: "done",
    FAILED: "an error of the program, or a negative result: `check` and `doctor` found something missing, `verify` a "
    "difference above the tolerance, `check-export` an answer that differs, `scaling` a point that failed",
    MISTAKE: "wrong arguments, files or data: one message, and nothing was written",
    SAVE_FAILED: "the disk had no space for the last checkpoint; earlier ones are intact",
    AGAIN: "`lifecycle.resume` and `train.sbatch`: start the same run again, it continues",
    STOP: "the run cannot continue by itself: another start would end in the same way",
    IN_USE: "another run uses the same `--save`",
    INTERRUPTED: "Ctrl-C",
    TERMINATED: "SIGTERM, of a run started on several ranks",
}
"""Exit code -> what happened, in Markdown. A process ended by another signal N has 128 + N, as in a shell."""
EXPLAINED = (IN_USE, STOP, SAVE_FAILED, MISTAKE, INTERRUPTED)
"""Codes with which a rank ends after it has printed the reason."""

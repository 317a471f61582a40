"""Filters for Megatron's output: one log line per interval, and each warning once. Behaviour is unchanged.

`INTERNVLX_VERBOSE=1` turns the filters off. Errors are never filtered.
"""

import builtins
import functools
import importlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.files import TRACKER
from megatron_internvlx.ranks import is_first_rank

VERBOSE = os.environ.get("INTERNVLX_VERBOSE") == "1"

# Lines that Megatron prints at start, at checkpoints and next to its log line; all other lines are shown.
_CHATTER = re.compile(
    "|".join(
        (
            r"\[[^\]]*\] datetime: |time to initialize|training \.\.\.|done with setup",
            r" ?> (setting|initializ|compiling|building|number of parameters|learning rate decay|finished)",
            r">>> done with|using world size|setting (global|training)|accumulate and all-reduce|Evaluating",
            r"using \S+ for parameters|Number of |Theoretical|Total number|Activation memory|\[Rank \d+\]",
            r"\(min, max\) time|    \S+ \.*: \(|Overwriting rerun_state_machine|WARNING: one_logger",
            r" > datasets target sizes|    (train|validation|test): +\d+$|compute_activation_memory",
            r" *\[[^\]]*\] (saving|successfully saved) checkpoint| loading (release )?(distributed )?checkpoint",
            r" checkpoint version|WARNING: Setting args\.overlap_p2p_comm and args\.align_param_gather",
            r"(Storing|Loading) distributed optimizer sharded|torch distributed is already initialized",
            r"sharded_state_dict metadata loaded|Checkpoint file not found in load directory None ",
        )
    )
)

# Expected if a run loads only weights from a checkpoint; in any other run they are worth showing.
_WEIGHTS_CHATTER = re.compile(
    r"could not find arguments in the checkpoint|WARNING: [TP]P size not found in checkpoint args"
    r"|\(TP, PP\) mismatch after resume .*RNG state will be ignored"
    r"|Job sharding has changed: Rerun state will be ignored"
)

# Expected on every CPU run; the CPU patches handle these cases.
_EXPECTED_ON_CPU = re.compile(
    r"Transformer Engine and Apex are not installed|Only transformer-engine>="
    r"|'pin_memory' argument is set|CPU RNG state changed within GPU RNG context|No CUDA runtime is found"
)

# Expected on every run; users cannot or should not change these.
_EXPECTED = re.compile(
    r"\s*It is recommended to use a ModelConfig|GPTModel IS DEPRECATED|MimoModelConfig is experimental"
    r"|RerunStateMachine initialized|Result validation enabled|Setting RerunStateMachine mode"
    r"|MCore's async save is deprecated|The \.grad attribute of a Tensor that is not a leaf"
    r"|torch.distributed is disabled, unavailable or uninitialized|The argument order of load has been"
    r"|Could not determine rank from|--fp8-recipe=\S+ is incompatible with the streaming checkpoint"
    # Transformer Engine has what apex is for, and files of models that are not ours ask for apex when imported.
    r"|Apex is not installed|Please use DTensor instead|`torch.distributed.\S+` is deprecated"
)

_PRINTING_MODULES = (
    "megatron.training.utils.common_utils",
    "megatron.training.arguments",
    "megatron.training.global_vars",
    "megatron.training.initialize",
    "megatron.training.checkpointing",
    "megatron.training.theoretical_memory_usage",
    "megatron.training.training",
)

_seen: set[str] = set()
_installed = False


def _is_new_cause(text: str) -> bool:
    """Whether this process has not yet shown a message with the same first sentence."""
    cause = re.split(r"[.,:\n] ?", text.strip(), maxsplit=1)[0][:80]
    if cause in _seen:
        return False
    _seen.add(cause)
    return True


class _Filter(logging.Filter):
    """Log filter that drops repeated and expected warnings."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu

    def should_show(self, text: str) -> bool:
        """Whether to show a warning with this text."""
        return is_first_rank() and not self.is_expected(text) and _is_new_cause(text)

    def is_expected(self, text: str) -> bool:
        """Whether the text is a known warning that needs no action."""
        return bool(_EXPECTED.match(text) or (self.on_cpu and _EXPECTED_ON_CPU.match(text)))

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep errors, keep each warning once, drop progress lines."""
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno < logging.WARNING:
            return False  # Megatron lowers the level to INFO for its own progress lines
        return self.should_show(record.getMessage())


def quiet_logs(*, on_cpu: bool = False) -> None:
    """Show each warning of Megatron at most once per cause, on rank 0 only. Safe to repeat."""
    global _installed
    if _installed or VERBOSE:
        return
    _installed = True
    log_filter = _Filter(on_cpu)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    handler.addFilter(log_filter)
    for name in ("megatron.core", "megatron.training"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("torch.utils.cpp_extension").addFilter(log_filter)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Megatron sets INFO for every library

    original = warnings.showwarning
    ours = re.compile(r"/megatron/(core|training)/|/torch/")

    def showwarning(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        text = str(message)
        if log_filter.should_show(text) if ours.search(filename) else not log_filter.is_expected(text):
            original(message, category, filename, *args, **kwargs)

    warnings.showwarning = showwarning
    # Given on every compilation of Megatron's files, so each time if Python may not write compiled files.
    warnings.filterwarnings("ignore", category=SyntaxWarning)


def _quiet_print(*values: Any, **kwargs: Any) -> None:
    lines = " ".join(str(value) for value in values).splitlines()
    shown = [line for line in lines if line.strip() and not _CHATTER.match(line)]
    if _starts_from_weights():
        shown = [line for line in shown if not _WEIGHTS_CHATTER.match(line)]
    if shown:
        builtins.print("\n".join(shown), **kwargs)


def _starts_from_weights() -> bool:
    """Whether this run starts at step 0 with the weights of a checkpoint."""
    from megatron.training import global_vars  # imported already: it is Megatron that prints

    settings = global_vars._GLOBAL_ARGS
    if settings is None:
        return False
    return bool(settings.finetune) or (bool(settings.load) and _is_import(settings.load))


@functools.lru_cache(maxsize=8)
def _is_import(directory: str) -> bool:
    """Whether the newest checkpoint of a directory is an import, which holds only weights."""
    try:
        return (Path(directory) / TRACKER).read_text() == "release"
    except OSError:
        return False


def quiet_prints() -> None:
    """Suppress Megatron's arguments dump, banners and memory reports; unknown lines are shown."""
    if VERBOSE:
        return
    for name in _PRINTING_MODULES:
        importlib.import_module(name).print = _quiet_print  # type: ignore[attr-defined]
    arguments = importlib.import_module("megatron.training.arguments")
    arguments._print_args = lambda title, args: None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class LogRecord:
    """Megatron's measurements at the end of a log interval."""

    iteration: int
    train_iters: int
    losses: dict[str, float]  # averages over the log interval; empty except on the last pipeline stage
    learning_rate: float | None
    grad_norm: float | None
    loss_scale: float
    skipped: int  # iterations skipped in the interval
    nan: int  # of them, those with a loss that is not finite
    seconds: float  # per iteration, mean over the interval, without evaluation and saving
    consumed_samples: int


def install_log_line(
    fn: Callable[[LogRecord], str | None],
    fn_eval: Callable[[str, dict[str, float] | None], str | None] | None = None,
    *,
    first_step: Callable[[], None] | None = None,
    evaluated: Callable[[float], None] | None = None,
) -> None:
    """Replace Megatron's lines about training and evaluation with those that `fn` and `fn_eval` return.

    Both are called on every rank (so they may communicate) and their text is printed on the last rank; None
    prints nothing. `fn_eval` gets Megatron's prefix ("iteration 20", "iteration 40 on test set") and the mean
    of each reported value: empty on ranks without the last pipeline stage, None if the time limit ended the
    evaluation early. `first_step` is called on every rank when the first step of the run has ended, and `evaluated`
    with the seconds of each evaluation, before its line. TensorBoard output is unchanged.
    A second call replaces the functions of the first.
    """
    import megatron.training.training as training

    quiet_prints()
    training.training_log = _with_log_line(training, _unwrap(training.training_log), fn, first_step)
    if fn_eval is not None:
        evaluation = _unwrap(training.evaluate_and_print_results)
        training.evaluate_and_print_results = _with_eval_line(training, evaluation, fn_eval, evaluated)


def _unwrap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Original function inside our wrapper, if a previous call of `install_log_line` has wrapped it."""
    return getattr(function, "__wrapped__", function)


class _TemporaryAttributes:
    """Context that replaces attributes of a module and restores them at the end."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.module, self.names = module, names
        self.saved: dict[str, Any] = {}

    def __enter__(self) -> None:
        self.saved = {name: getattr(self.module, name) for name in self.names}
        for name, value in self.names.items():
            setattr(self.module, name, value)

    def __exit__(self, *_: Any) -> None:
        for name, value in self.saved.items():
            setattr(self.module, name, value)


def _print_on_last_rank(training: Any, text: str | None) -> None:
    if text is not None and training.is_last_rank():
        builtins.print(text, flush=True, file=sys.stdout)


def _averages(totals: dict[str, Any]) -> tuple[dict[str, float], int, int]:
    """Losses, skipped and NaN counts from Megatron's running totals, as computed by `training_log`."""
    counts = {key: int(totals[key]) for key in totals if key.endswith(" iterations")}
    advanced = max(1, counts["advanced iterations"])
    losses = {key: float(totals[key]) / advanced for key in totals if key not in counts}
    return losses, counts["skipped iterations"], counts["nan iterations"]


def _with_log_line(
    training: Any,
    original: Callable[..., bool],
    fn: Callable[..., str | None],
    first_step: Callable[[], None] | None = None,
) -> Any:
    """Wrap `training_log`; the totals are read when it reads the interval timer, just before it resets them."""

    @functools.wraps(original)
    def training_log(
        loss_dict: dict[str, Any],
        total_loss_dict: dict[str, Any],
        learning_rate: float | None,
        iteration: int,
        loss_scale: float,
        report_memory_flag: bool,
        skipped_iter: int,
        grad_norm: float | None,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        taken: dict[str, Any] = {"lr": learning_rate}
        timer = training.get_timers()("interval-time")
        reduce_max = training.reduce_max_stat_across_model_parallel_group

        def elapsed(*a: Any, **k: Any) -> float:
            seconds: float = type(timer).elapsed(timer, *a, **k)
            taken["averages"] = _averages(total_loss_dict)
            iterations = total_loss_dict["advanced iterations"] + total_loss_dict["skipped iterations"]
            taken["seconds"] = seconds / iterations
            return seconds

        def largest(*a: Any, **k: Any) -> float | None:
            taken["lr"] = reduce_max(*a, **k)
            return taken["lr"]

        # Megatron logs its first iteration without ending the interval: wrong if the interval ends there.
        interval_ends = iteration % training.get_args().log_interval == 0
        run_begins = kwargs.pop("is_first_iteration", False)
        first = run_begins and not interval_ends
        timer.elapsed = elapsed
        try:
            with _TemporaryAttributes(
                training,
                reduce_max_stat_across_model_parallel_group=largest,
                print_rank_last=lambda _line: None,
            ):
                flag = original(
                    loss_dict, total_loss_dict, learning_rate, iteration, loss_scale, report_memory_flag,
                    skipped_iter, grad_norm, *args, is_first_iteration=first, **kwargs,
                )  # fmt: skip
        finally:
            del timer.elapsed
        if run_begins and first_step is not None:
            first_step()
        if "averages" in taken:
            losses, skipped, nan = taken["averages"]
            settings = training.get_args()
            record = LogRecord(
                iteration=iteration,
                train_iters=settings.train_iters,
                losses=losses,
                learning_rate=taken["lr"],
                grad_norm=None if grad_norm is None else float(grad_norm),
                loss_scale=float(loss_scale),
                skipped=skipped,
                nan=nan,
                seconds=taken["seconds"],
                consumed_samples=settings.consumed_train_samples,
            )
            _print_on_last_rank(training, fn(record))
        return flag

    return training_log


def _with_eval_line(
    training: Any,
    original: Callable[..., None],
    fn: Callable[..., str | None],
    evaluated: Callable[[float], None] | None = None,
) -> Any:
    """Wrap `evaluate_and_print_results` and record the results of its calls of `evaluate`.

    Megatron evaluates at every --eval-interval and after the last step; if both coincide, this evaluates once.
    """
    last = ""

    @functools.wraps(original)
    def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> None:
        nonlocal last
        # "iteration 40" in training, "iteration 40 on validation set" after it
        before, last = last, prefix
        if prefix == f"{before} on validation set":
            return
        found: dict[str, float] | None = None
        evaluate = training.evaluate

        def evaluate_and_record(*a: Any, **k: Any) -> Any:
            nonlocal found
            totals, data, out_of_time = evaluate(*a, **k)
            if not out_of_time:
                found = {name: float(value) for name, value in totals.items()}
            return totals, data, out_of_time

        start = time.monotonic()
        with _TemporaryAttributes(training, evaluate=evaluate_and_record, print_rank_last=lambda _line: None):
            original(prefix, *args, **kwargs)
        if evaluated is not None:
            evaluated(time.monotonic() - start)
        _print_on_last_rank(training, fn(prefix, found))

    return evaluate_and_print_results

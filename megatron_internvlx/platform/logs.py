"""What Megatron says: one line per iteration, and each warning once. Filters text; changes no behaviour.

`INTERNVLX_VERBOSE=1` turns the filters off. Errors are never filtered.
"""

import builtins
import functools
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_internvlx.files import TRACKER
from megatron_internvlx.ranks import is_first_rank

VERBOSE = os.environ.get("INTERNVLX_VERBOSE") == "1"

# What Megatron prints at start, at checkpoints and beside its log line; anything else passes.
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

# What it says when it takes weights alone from a checkpoint, as it was told to: of the rest it would be news.
_CHATTER_ABOUT_WEIGHTS = re.compile(
    r"could not find arguments in the checkpoint|WARNING: [TP]P size not found in checkpoint args"
    r"|\(TP, PP\) mismatch after resume .*RNG state will be ignored"
    r"|Job sharding has changed: Rerun state will be ignored"
)

# True on every CPU run, and what the CPU patches are for.
_EXPECTED_ON_CPU = re.compile(
    r"Transformer Engine and Apex are not installed|Only transformer-engine>="
    r"|'pin_memory' argument is set|CPU RNG state changed within GPU RNG context|No CUDA runtime is found"
)

# True on every run, and nothing that a user could or should change.
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


def _first_time(text: str) -> bool:
    """Whether the cause, taken to be the message's first sentence, is new in this process."""
    cause = re.split(r"[.,:\n] ?", text.strip(), maxsplit=1)[0][:80]
    if cause in _seen:
        return False
    _seen.add(cause)
    return True


class _Filter(logging.Filter):
    """Drops what every rank repeats, and what is expected on CPU."""

    def __init__(self, on_cpu: bool) -> None:
        super().__init__()
        self.on_cpu = on_cpu

    def keeps(self, text: str) -> bool:
        """Whether a warning with this text is to be shown."""
        return is_first_rank() and not self.expected(text) and _first_time(text)

    def expected(self, text: str) -> bool:
        """Whether the text says what is known and cannot be helped."""
        return bool(_EXPECTED.match(text) or (self.on_cpu and _EXPECTED_ON_CPU.match(text)))

    def filter(self, record: logging.LogRecord) -> bool:
        """Errors pass; warnings pass once; progress lines do not."""
        if record.levelno >= logging.ERROR:
            return True
        if record.levelno < logging.WARNING:
            return False  # Megatron lowers the level to INFO for its own progress lines
        return self.keeps(record.getMessage())


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
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # Megatron lets every library say what it does

    original = warnings.showwarning
    ours = re.compile(r"/megatron/(core|training)/|/torch/")

    def showwarning(message: Any, category: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        text = str(message)
        if log_filter.keeps(text) if ours.search(filename) else not log_filter.expected(text):
            original(message, category, filename, *args, **kwargs)

    warnings.showwarning = showwarning
    # Warnings given while Megatron's files are compiled, when Python may not keep the compiled files.
    warnings.filterwarnings("ignore", category=SyntaxWarning)


def _quiet_print(*values: Any, **kwargs: Any) -> None:
    lines = " ".join(str(value) for value in values).splitlines()
    kept = [line for line in lines if line.strip() and not _CHATTER.match(line)]
    if _takes_weights_alone():
        kept = [line for line in kept if not _CHATTER_ABOUT_WEIGHTS.match(line)]
    if kept:
        builtins.print("\n".join(kept), **kwargs)


def _takes_weights_alone() -> bool:
    """Whether this start begins at step 0 with the weights of a checkpoint."""
    from megatron.training import global_vars  # it is what prints

    settings = global_vars._GLOBAL_ARGS
    if settings is None:
        return False
    return bool(settings.finetune) or (bool(settings.load) and _is_import(settings.load))


@functools.lru_cache(maxsize=8)
def _is_import(directory: str) -> bool:
    """Whether the newest checkpoint here is an import, which has weights and nothing else."""
    try:
        return (Path(directory) / TRACKER).read_text() == "release"
    except OSError:
        return False


def quiet_prints() -> None:
    """Drop Megatron's arguments dump, banners and memory reports; lines that are not known pass."""
    if VERBOSE:
        return
    for name in _PRINTING_MODULES:
        importlib.import_module(name).print = _quiet_print  # type: ignore[attr-defined]
    arguments = importlib.import_module("megatron.training.arguments")
    arguments._print_args = lambda title, args: None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class LogRecord:
    """What Megatron knows at a log interval."""

    iteration: int
    train_iters: int
    losses: dict[str, float]  # averages over the log interval; empty but on the last pipeline stage
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
) -> None:
    """Replace Megatron's lines about training and evaluation by those that `fn` and `fn_eval` return.

    Both are called on every rank (so they may communicate) and their text is printed on the last rank; None
    prints nothing. `fn_eval` gets Megatron's prefix ("iteration 20", "iteration 40 on test set") and the mean
    of each reported value, empty on ranks without the last pipeline stage; None where the time limit cut the
    evaluation short. TensorBoard is written as before.
    A second call replaces the first.
    """
    import megatron.training.training as training

    quiet_prints()
    training.training_log = _with_log_line(training, _megatrons(training.training_log), fn)
    if fn_eval is not None:
        evaluation = _megatrons(training.evaluate_and_print_results)
        training.evaluate_and_print_results = _with_eval_line(training, evaluation, fn_eval)


def _megatrons(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without a wrapper of ours, which a second call of `install_log_line` replaces."""
    return getattr(function, "__wrapped__", function)


class _Replaced:
    """Replaces names in a module while a call lasts."""

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
    """Losses, skipped and NaN counts out of Megatron's running totals, as `training_log` computes them."""
    counts = {key: int(totals[key]) for key in totals if key.endswith(" iterations")}
    advanced = max(1, counts["advanced iterations"])
    losses = {key: float(totals[key]) / advanced for key in totals if key not in counts}
    return losses, counts["skipped iterations"], counts["nan iterations"]


def _with_log_line(training: Any, original: Callable[..., bool], fn: Callable[..., str | None]) -> Any:
    """Wrap `training_log`: it reads the interval timer just before it resets the totals, so we look there."""

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

        # Megatron logs its first iteration without closing the interval, which is right unless it ends there.
        interval_ends = iteration % training.get_args().log_interval == 0
        first = kwargs.pop("is_first_iteration", False) and not interval_ends
        timer.elapsed = elapsed
        try:
            with _Replaced(
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


def _with_eval_line(training: Any, original: Callable[..., None], fn: Callable[..., str | None]) -> Any:
    """Wrap `evaluate_and_print_results`, keeping what each of its calls of `evaluate` returned.

    Megatron evaluates at every --eval-interval and after the last step: where both fall together, once.
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

        def kept(*a: Any, **k: Any) -> Any:
            nonlocal found
            totals, data, out_of_time = evaluate(*a, **k)
            if not out_of_time:
                found = {name: float(value) for name, value in totals.items()}
            return totals, data, out_of_time

        with _Replaced(training, evaluate=kept, print_rank_last=lambda _line: None):
            original(prefix, *args, **kwargs)
        _print_on_last_rank(training, fn(prefix, found))

    return evaluate_and_print_results

"""A pool of real gloo ranks, shared by all tests of a session and by benchmarks.

A process takes seconds to import Megatron, so the ranks are forked from a server that has imported it
already, and stay for the next job. Each job gets a fresh process group and leaves no state of Megatron
behind. A job that fails or hangs costs its processes, which are replaced at the next use; it cannot hang the
session.

    def rank_sum(scale):                      # a function of a module, so that it can be pickled
        x = torch.ones(1) * scale
        torch.distributed.all_reduce(x)
        return x.item()

    def test_sum(pool):
        assert pool.run(2, rank_sum, 3.0) == [6.0, 6.0]
"""

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from megatron_internvlx.checkpoint.target import preload_workers

MAX_RANKS = 8
LONGER = 60.0  # seconds that a collective may take more than its job
MAX_THREADS = 60  # of a rank between two jobs
_OUTPUT_TAIL = 6000  # characters of a rank's output shown when it fails


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback and last output."""


class Pool:
    """Persistent ranks, started when first needed."""

    def __init__(self, preload: str = "testing.preload") -> None:
        # gloo looks for an interface by the host's name otherwise, which may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._context = multiprocessing.get_context("forkserver")
        preload_workers(preload)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._workers: list[_Worker | None] = [None] * MAX_RANKS
        self._jobs = 0
        self.outputs: list[str] = []  # what each rank of the last job printed
        atexit.register(self.close)

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Runs `fn(*args)` on every rank of a new world; returns the results in the order of the ranks.

        Raises RankError with the traceback of the first rank that failed.
        """
        self._jobs += 1
        store = Path(self._folder.name) / f"store{self._jobs}"
        workers = [self._worker(rank) for rank in range(world_size)]
        for worker in workers:
            worker.send(pickle.dumps((fn, args, world_size, str(store), timeout)))
        try:
            answers = self._collect(workers, time.monotonic() + timeout)
        finally:
            self.outputs = [worker.output() for worker in workers]
        failed = [answer for answer in answers if not answer[0]]
        if failed or len(answers) < world_size or self._crowded(world_size):
            self._discard(world_size)
        if failed or len(answers) < world_size:
            raise RankError(failed[0][1] if failed else "a rank is missing")
        return [value for _, value in answers]

    def close(self) -> None:
        """Ends all ranks; safe to repeat."""
        atexit.unregister(self.close)
        self._discard(MAX_RANKS)
        self._folder.cleanup()

    def _worker(self, rank: int) -> "_Worker":
        worker = self._workers[rank]
        if worker is None or not worker.process.is_alive():
            worker = self._workers[rank] = _Worker(self._context, rank, Path(self._folder.name))
        return worker

    def _collect(self, workers: list["_Worker"], deadline: float) -> list[tuple[bool, Any]]:
        """Waits for all answers, or for the first failure."""
        answers: dict[int, tuple[bool, Any]] = {}
        while missing := [rank for rank in range(len(workers)) if rank not in answers]:
            # The process too: a child of a dead rank may hold its end of the connection open.
            signs: dict[Any, int] = {workers[rank].connection: rank for rank in missing}
            signs.update({workers[rank].process.sentinel: rank for rank in missing})
            ready = wait(list(signs), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                stacks = "\n".join(workers[rank].stack() for rank in missing)
                return [(False, f"no answer in time from ranks {missing}\n{stacks}")]
            for rank in {signs[sign] for sign in ready}:
                answers[rank] = workers[rank].receive()
                if not answers[rank][0]:
                    return [self._cause(workers, answers[rank])]
        return [answers[rank] for rank in range(len(workers))]

    def _cause(self, workers: list["_Worker"], failure: tuple[bool, Any]) -> tuple[bool, Any]:
        """The failure, or the death of a rank which broke the connections of the one that failed."""
        dead = wait([worker.process.sentinel for worker in workers], timeout=0.2)
        for worker in workers:
            if worker.process.sentinel in dead:
                return worker.receive()
        return failure

    def _crowded(self, count: int) -> bool:
        """Whether a rank keeps many threads of process groups that are gone.

        Each gloo group that something still refers to has a thread that wakes a hundred times a second;
        after a dozen jobs these threads take all the machine's time. A fork is cheaper.
        """
        pids = [worker.process.pid for worker in self._workers[:count] if worker is not None]
        return any(_threads(pid) > MAX_THREADS for pid in pids if pid)

    def _discard(self, count: int) -> None:
        for rank in range(count):
            worker, self._workers[rank] = self._workers[rank], None
            if worker is not None:
                worker.kill()


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # the process is gone, or the system has no /proc
        return 0


class _Worker:
    """The parent's end of one rank."""

    def __init__(self, context: Any, rank: int, folder: Path) -> None:
        self.rank = rank
        self.log = folder / f"rank{rank}.log"
        self.stacks = folder / f"rank{rank}.stacks"
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, rank, str(self.log), str(self.stacks), list(sys.path))
        )
        self.process.start()
        theirs.close()

    def send(self, job: bytes) -> None:
        """Gives the rank a job."""
        self.connection.send_bytes(job)

    def receive(self) -> tuple[bool, Any]:
        """Takes the answer; a rank that died without one has failed."""
        try:
            if not self.connection.poll():
                raise EOFError
            ok, value = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join(5)
            ok, value = False, f"died with exit code {self.process.exitcode}"
        if not ok:
            value = f"rank {self.rank}: {value}\n--- its output ---\n{self.output()[-_OUTPUT_TAIL:]}"
        return ok, value

    def output(self) -> str:
        """What the rank printed since its last job began."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stack(self) -> str:
        """Where every thread of the rank is now."""
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        text = self.stacks.read_text(errors="replace") if self.stacks.exists() else ""
        return f"rank {self.rank}:\n{text}\n--- its output ---\n{self.output()[-_OUTPUT_TAIL:]}"

    def kill(self) -> None:
        """Ends the process and what it started."""
        # Of a dead rank the number may be another process's by now.
        if self.process.is_alive() and self.process.pid:
            with contextlib.suppress(ProcessLookupError):  # it has not founded its group yet
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, rank: int, log: str, stacks: str, path: list[str]) -> None:
    """The life of a rank: jobs until the parent goes away."""
    sys.path[:] = path
    os.setsid()  # a group of its own, which `kill` ends as a whole
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)  # noqa: SIM115
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        os.ftruncate(output, 0)
        os.lseek(output, 0, os.SEEK_SET)
        answer: tuple[bool, Any]
        try:
            fn, args, world_size, store, timeout = pickle.loads(job)
            answer = (True, _run(fn, args, rank, world_size, store, timeout))
            reply = pickle.dumps(answer)
        except BaseException:  # SystemExit too: Megatron calls sys.exit
            reply = pickle.dumps((False, traceback.format_exc()))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(reply)


def _run(
    fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, store: str, timeout: float
) -> Any:
    """One job: a fresh process group before, no state of Megatron after."""
    from megatron_internvlx import platform

    platform.setup()
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        # Longer than the pool waits: a hang is then told with the stacks of all ranks, not as one rank's timeout.
        timeout=timedelta(seconds=timeout + LONGER),
    )
    result = fn(*args)
    # Nobody tears down while another rank still talks to it. After an error nothing is torn down: the others
    # would fail too, perhaps sooner, and hide its cause; the parent ends all of them.
    torch.distributed.barrier()
    forget_megatron()
    torch.distributed.destroy_process_group()
    gc.collect()
    return result


def forget_megatron() -> None:
    """Destroys every global of Megatron that a job may have set, so that the next one starts clean."""
    import megatron.core.tensor_parallel.random as random
    import megatron.training.checkpointing as checkpointing
    import megatron.training.global_vars as global_vars
    import megatron.training.training as training
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    if (writer := global_vars._GLOBAL_TENSORBOARD_WRITER) is not None:
        writer.close()
    training.destroy_global_state()
    # A rank that has trained before would join a collective that a new one does not.
    training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    checkpointing._CHECKPOINT_VERSION = checkpointing._LOADED_ITERATION = None
    # A run with experts leaves a scale of another shape than a start sets.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None

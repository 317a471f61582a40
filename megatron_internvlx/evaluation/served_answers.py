"""`transformers serve` on an export as a process, and answers to chat requests over HTTP."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_internvlx.evaluation.chat_messages import with_data

START_SECONDS = 600  # until a server answers; importing takes a minute and more on a busy machine
NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")
REMEDY = "pip install 'megatron-internvlx[serve]'"


class ServerError(RuntimeError):
    """A server that did not start, or a request that it refused."""


def missing_packages() -> list[str]:
    """Packages that `transformers serve` needs and this Python does not have."""
    return [name for name in NEEDED if find_spec(name) is None]


def free_port() -> int:
    """TCP port of this machine on which nothing listens, for a server that takes seconds to start.

    It is below the ports that the system gives to outgoing connections and to whoever asks for any port: one of
    those can be taken by another program while the server imports its packages. Raises ServerError.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:  # not Linux
        end = 32_768
    # Some machines give out almost all of their ports: then no choice is better than another.
    ports = range(10_000, end if end > 11_000 else 32_768)
    for port in random.SystemRandom().sample(ports, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError(f"no free port was found between {ports[0]} and {ports[-1]}")


@contextmanager
def transformers_server(hf: Path, log: Path, *, device: str, dtype: str) -> Iterator[tuple[str, int]]:
    """Start `transformers serve --trust-remote-code` on a free port of this machine; yields (address, process id).

    It is stopped when the block ends. Raises ServerError, with the last line of `log`, if it does not start.
    """
    port = free_port()
    command = [
        sys.executable, "-c", "import sys; from transformers.cli.transformers import main; sys.exit(main())",
        "serve", str(hf), "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), "--device", device,
        "--dtype", dtype,
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={"HF_HUB_OFFLINE": "1", **os.environ}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_up(address, process, log)
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerError(f"transformers serve ended while it started: {last_line(log)}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise ServerError(f"transformers serve did not start within {START_SECONDS} s: {last_line(log)}")


def last_line(log: Path) -> str:
    """Last line with text of a log, at most 300 characters of it."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no output"


def ask(address: str, model: str, messages: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """Answer of the server to one chat request, as JSON.

    Args:
        address: of the server, without a path.
        model: name under which it serves the model; a directory's path for transformers.
        messages: OpenAI's.
        settings: further fields of the request, such as `max_tokens`.

    Raises:
        ServerError: the request was refused, with status and reason.
    """
    body = json.dumps({"model": model, "messages": list(messages), **settings}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")[:300]
        raise ServerError(f"status {error.code}: {reason}") from error
    except OSError as error:
        raise ServerError(f"{address}: {error}") from error


def answers_of_server(job: dict[str, Any], log: Path, device: str) -> dict[str, Any]:
    """Answers through `transformers serve`, one request at a time, in the form of local_answers.py.

    `job` has `hf`, `dtype`, `max_new_tokens` and `messages`. A server tells no token ids: `tokens` is None.
    Raises ServerError.
    """
    answers, prompts, counts = [], [], []
    with transformers_server(Path(job["hf"]), log, device=device, dtype=job["dtype"]) as (address, process):
        requests = [with_data(messages) for messages in job["messages"]]
        start = time.perf_counter()
        for messages in requests:
            found = ask(address, job["hf"], messages, max_tokens=job["max_new_tokens"], temperature=0)
            answers.append({"text": found["choices"][0]["message"]["content"].strip(), "tokens": None})
            prompts.append(found["usage"]["prompt_tokens"])
            counts.append(found["usage"]["completion_tokens"])
        seconds = time.perf_counter() - start
        peak = peak_memory(process)
    return {
        "answers": answers, "prompt_tokens": prompts, "seconds": seconds, "peak_bytes": peak,
        "answer_tokens": sum(counts),
    }  # fmt: skip


def peak_memory(process: int) -> int | None:
    """The most memory in bytes that a running process had; None where the system does not tell."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None

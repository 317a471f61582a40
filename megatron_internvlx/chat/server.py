"""The page's server process: address, port, and its end."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import sys
from typing import Any

from megatron_internvlx.chat.session import Chat
from megatron_internvlx.evaluation.generation import Sampling

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})


def plain_host(name: str) -> str:
    """Name of a host as names are compared: in small letters, without the dot of a complete name."""
    return name.lower().removesuffix(".")


def is_local(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return plain_host(host) == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def answered_names(host: str) -> frozenset[str]:
    """Names under which the page at an address may be asked for; empty: all, for an address that others reach."""
    if not is_local(host):
        return frozenset()
    own = {plain_host(host)}
    if ":" in host:  # also as browsers write it
        own = {f"[{host.lower()}]", f"[{ipaddress.ip_address(host).compressed}]"}
    return LOCAL_NAMES | own


def serve(chat: Chat, sampling: Sampling, host: str, port: int, system: str | None = None) -> None:
    """Serve the page until Ctrl-C.

    Args:
        chat: the loaded model.
        sampling: settings of answers.
        host: address to listen at; 127.0.0.1 is reached from this machine only.
        port: port; 0: a free one.
        system: system text; None: that of the chat template.

    Raises ValueError if the port is taken or the address is not one of this machine.
    """
    listening = listen(host, port)
    port = listening.getsockname()[1]
    print("\n".join([*chat.about.lines(), *address_lines(host, port)]), flush=True)
    try:
        make_server(chat, sampling, system, host).run([listening])
    except KeyboardInterrupt:  # raised again by uvicorn after an orderly end
        pass
    finally:
        listening.close()


def make_server(chat: Chat, sampling: Sampling, system: str | None = None, host: str = "127.0.0.1") -> Any:
    """Create the uvicorn server; `run([socket])` serves.

    Args:
        chat: the loaded model.
        sampling: settings of answers.
        system: system text; None: that of the chat template.
        host: address that it listens at; at one of this machine only, other names of it are refused.
    """
    try:
        import uvicorn

        from megatron_internvlx.chat.web import make_app
    except ImportError as error:
        raise ValueError(f"--web needs {error.name}: pip install starlette uvicorn") from error
    app = make_app(chat, sampling, system, answered_names(host))
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on", ws="none"
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """Socket that listens at an address. Raises ValueError with the remedy."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host}: not an address of this machine: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"--port {port}: taken by another program; set another one, or 0") from error
        raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error
    return listening


def address_lines(host: str, port: int) -> list[str]:
    """Lines with the address of the page, and with the way to it from another machine."""
    shown = f"[{host}]" if ":" in host else host
    lines = [f"the page: http://{shown}:{port}   (Ctrl-C ends)"]
    name = socket.gethostname()
    if not is_local(host):
        lines[0] = f"the page: http://{name}:{port}   (Ctrl-C ends)"
        lines.append("everybody who reaches this machine can use it; there is no password")
    elif "SSH_CONNECTION" in os.environ or not sys.stdout.isatty() or "SLURM_JOB_ID" in os.environ:
        lines.append(
            f"from another machine: ssh -L {port}:127.0.0.1:{port} {name}   then open the same address"
        )
    return lines

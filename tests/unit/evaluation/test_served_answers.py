"""The port of a server that takes its time to listen."""

import random
import socket
from pathlib import Path

import pytest

from megatron_internvlx.evaluation import served_answers
from megatron_internvlx.evaluation.served_answers import ServerError, free_port


def test_nobody_is_given_a_servers_port_by_the_system() -> None:
    """Outgoing connections, and sockets bound to port 0, get ports of the range that the system says."""
    before = random.getstate()
    first_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port < first_given or first_given <= 11_000
    assert random.getstate() == before
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
        monkeypatch.setattr(served_answers.random, "SystemRandom", lambda: Drawn([number, free]))
        assert free_port() == free
        monkeypatch.setattr(served_answers.random, "SystemRandom", lambda: Drawn([number]))
        with pytest.raises(ServerError, match="no free port was found between 10000 and"):
            free_port()


class Drawn:
    """Random numbers that are known."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports

    def sample(self, _ports: range, _count: int) -> list[int]:
        return self.ports

"""The cluster check on this machine: what a node lacks is named, and every rank's host with it."""

from pathlib import Path

import pytest

from megatron_internvlx.commands import check, node_checks, world_checks


def world(folder: str) -> list[str]:
    return [str(check) for check in world_checks.world_checks(Path(folder), 1, 0.0)]


def test_node_without_wanted_gpus_is_named(tmp_path, capsys):
    code = check.main(["--node", "--gpus", "9999", "--scratch", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 1
    assert any(line.startswith("missing") and "GPUs" in line for line in lines)
    assert any("megatron-core" in line and line.startswith("ok") for line in lines)
    assert any("DALI: cuts" in line for line in lines)


def test_a_broken_package_is_a_finding(monkeypatch):
    def broken() -> node_checks.Check:
        raise OSError("libnvjpeg.so: cannot open\nmore")

    (found,) = node_checks.run_check("DALI", broken)
    assert (found.status, found.name) == ("missing", "DALI")
    assert "libnvjpeg" in found.detail


def test_missing_decoder_is_named(monkeypatch):
    monkeypatch.setattr(node_checks, "OTHER_FORMATS", ("PNG", "GIF"))  # DALI cannot read GIF anywhere
    found = node_checks._check_dali()
    assert found.status == "slow"
    assert "no decoder for GIF: Pillow cuts these" in found.detail


def test_ranks_agree_on_clock_speed_bandwidth_and_files(pool, tmp_path):
    first, _ = pool.run(2, world, str(tmp_path))
    names = [line.split(None, 2)[2].split(":")[0] for line in first]
    assert names[0] == "clocks" and names[-2:] == ["all-reduce", "shared files"]
    assert all(line.startswith(("ok", "slow")) for line in first)
    assert list(tmp_path.iterdir()) == []


def all_reduce(slowest: float) -> list[str]:
    return [str(check) for check in world_checks._measure_all_reduce(1, slowest)]


def test_a_slow_link_is_called_slow(pool):
    (found,), _ = pool.run(2, all_reduce, 1e6)
    assert found.startswith("slow") and "1e+06 expected" in found


@pytest.mark.parametrize(
    ("backend", "options", "least"),
    [("nccl", [], world_checks.SLOW_LINK), ("gloo", [], 0.0), ("nccl", ["--min-bandwidth", "150"], 150.0)],
)
def test_links_between_gpus_have_a_least_speed(monkeypatch, backend, options, least):
    asked = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(world_checks.platform, "backend", lambda: backend)
    monkeypatch.setattr(world_checks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(world_checks.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(world_checks, "world_checks", lambda *given: asked.append(given) or [])
    assert check.main(options) == 0
    assert asked == [(None, 256, least)]


def unwritable(folder: str) -> list[str]:
    return [str(check) for check in world_checks._check_shared_files(Path(folder), 1)]


def test_a_shared_directory_that_cannot_be_written_is_a_finding(pool):
    first, _ = pool.run(2, unwritable, "/proc/nowhere")
    assert len(first) == 1 and first[0].startswith("missing")
    assert "rank 0 cannot write to /proc/nowhere: No such file" in first[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shared", "/tmp"], "start this with torchrun"),
        (["--node", "--megabytes", "0"], "--megabytes: 0: must be a whole number"),
        (["--node", "--gpus", "x"], "--gpus: x: must be a whole number"),
    ],
)
def test_mistakes_on_the_command_line(options, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        check.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_scratch_that_is_not_there_is_a_finding(capsys):
    assert check.main(["--node", "--gpus", "0", "--scratch", "/nowhere"]) == 1
    assert "missing" in capsys.readouterr().out

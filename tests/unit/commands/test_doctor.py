"""The examination of this machine: each line with a remedy unless it is ok, and packages against their versions."""

import json

import pytest

from megatron_internvlx.commands import doctor, machine_checks
from megatron_internvlx.commands.node_checks import Check


def package_lines(needed: list[str], tested: dict[str, str]) -> dict[str, Check]:
    return {check.name: check for check in machine_checks.package_checks(needed, tested)}


def test_packages_are_compared_with_what_is_required_and_tested() -> None:
    needed = [
        "torch>=1", "no-such-package>=2; python_version > '3'", "left-out; python_version < '3'",
        "of-an-extra; extra == 'gpu'", "packaging>=9999", "numpy", "transformers",
    ]  # fmt: skip
    found = package_lines(needed, {"no-such-package": "2.5", "transformers": "1.0"})
    assert (found["torch"].status, found["torch"].remedy) == ("ok", "")
    assert found["no-such-package"].status == "missing"
    assert found["no-such-package"].remedy == "pip install no-such-package==2.5"
    assert found["packaging"].status == "missing" and "; >=9999 is needed" in found["packaging"].detail
    assert found["packaging"].remedy == "pip install 'packaging>=9999'"
    assert found["transformers"].status == "ok" and found["transformers"].detail.endswith("; tested with 1.0")
    assert "left-out" not in found and "of-an-extra" not in found
    assert found["other packages"].detail.startswith("1 of 1")  # numpy


def test_versions_of_the_tests_are_those_of_the_constraints() -> None:
    tested = machine_checks.constraints()
    assert len(tested) > 100 and tested["megatron-core"].startswith("0.19.")


def test_lines_and_objects(monkeypatch, tmp_path, capsys) -> None:
    found = [
        Check("ok", "one", "fine"),
        Check("slow", "two", "so so", remedy="do this"),
        Check("missing", "GPUs", "none"),
    ]
    monkeypatch.setattr(machine_checks, "_all_checks", lambda _: iter(found))
    assert doctor.main(["--scratch", str(tmp_path)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["ok", "slow", "->", "missing", "->", "1"]
    assert shown[-1] == "1 ok, 1 slow, 1 missing"
    assert doctor.main(["--json"]) == 1
    objects = json.loads(capsys.readouterr().out)
    assert [one["remedy"] for one in objects] == ["", "do this", machine_checks.REMEDIES["GPUs"]]
    found.pop()
    assert doctor.main([]) == 0


@pytest.mark.parametrize(
    ("backend", "files", "status", "said"),
    [
        ("gloo", 0, "slow", "none: runs use the CPU"),
        ("gloo", 2, "missing", "2 found, but PyTorch cannot use them"),
        ("nccl", 2, "ok", "2 x H100, 79 of 80 GiB free; CUDA 13.0, driver 580.1"),
    ],
)
def test_gpus(monkeypatch, backend: str, files: int, status: str, said: str) -> None:
    gib = machine_checks.GIB
    monkeypatch.setattr(machine_checks.platform, "backend", lambda: backend)
    monkeypatch.setattr(machine_checks.platform, "device_name", lambda: "H100")
    monkeypatch.setattr(machine_checks, "visible_cards", lambda: files)
    for name, value in (("card_count", 2), ("free_and_total_memory", (79 * gib, 80 * gib)),
                        ("cuda_version", "13.0"), ("driver_version", "580.1")):  # fmt: skip
        monkeypatch.setattr(machine_checks.cards, name, lambda value=value: value)
    check = machine_checks._gpus()
    assert check.status == status and said in check.detail


def test_version_of_the_driver(monkeypatch, tmp_path) -> None:
    cards = machine_checks.cards
    monkeypatch.setattr(cards, "DRIVER", tmp_path / "version")
    assert cards.driver_version() == "unknown"
    cards.DRIVER.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\nGCC\n"
    )
    assert cards.driver_version() == "580.65.06"

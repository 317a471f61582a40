"""The benchmarks of a few minutes, one after another: `make bench`. A failure does not stop the others."""

import subprocess
import sys

# The others (convert, data, kills and every --full) take long or need space; each says how to start it.
QUICK = ("step_time", "rvtc", "pipeline", "memory", "quality", "gpu_report")
IN_TESTS = "tests.boundary_table"  # uses the layout tests' runs


def main() -> int:
    """Run them; returns 1 if one failed."""
    failed = []
    for name in (*(f"benchmarks.{name}" for name in QUICK), IN_TESTS):
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", name], check=False).returncode:
            failed.append(name)
    if failed:
        print("failed: " + ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

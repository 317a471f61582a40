"""The benchmarks of a few minutes, one after another: `make bench`. A failure does not stop the others."""

import subprocess
import sys

# The others (convert, data, kills and every --full) take long or need space; each says how to start it.
QUICK = ("step_time", "rvtc", "pipeline", "memory", "boundary", "quality", "gpu_report")


def main() -> int:
    """Run them; returns 1 if one failed."""
    failed = []
    for name in QUICK:
        print(f"== benchmarks.{name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        print("failed: " + ", ".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

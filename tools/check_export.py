#!/usr/bin/env python
"""Start megatron_internvlx/commands/check_export.py by its path, as torchrun and sbatch do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_internvlx.commands.check_export import main

if __name__ == "__main__":
    sys.exit(main())

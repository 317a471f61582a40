"""Where launchers of earlier versions ask: `python -m megatron_internvlx.training.resume`.

The question and its answer are in `lifecycle/resume.py`.
"""

import sys

from megatron_internvlx.lifecycle.resume import main

if __name__ == "__main__":
    sys.exit(main())

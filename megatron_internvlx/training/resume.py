"""Old name of the command that launchers call: `python -m megatron_internvlx.training.resume`.

The program is `lifecycle/resume.py`.
"""

import sys

from megatron_internvlx.lifecycle.resume import main

if __name__ == "__main__":
    sys.exit(main())

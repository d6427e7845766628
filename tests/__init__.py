"""The tests of tlgc_mp. They run on the CPU, also where there is an accelerator, but for those in tests/accelerator."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

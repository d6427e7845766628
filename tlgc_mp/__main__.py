"""``python -m tlgc_mp`` is the ``tlgc-mp`` command."""

import sys

from tlgc_mp.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m tlgc_mp`` is the ``tlgc-mp`` command."""

from tlgc_mp.cli.main import entry

if __name__ == "__main__":
    entry()

"""`python -m workers.emulator` is `headgate emulate`."""

import sys

from workers.cli import app

if __name__ == "__main__":
    app(["emulate", *sys.argv[1:]] if sys.argv[1:2] != ["emulate"] else None)

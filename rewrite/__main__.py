"""`python -m rewrite` is the command `rewrite`."""

from __future__ import annotations

import sys

from rewrite.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

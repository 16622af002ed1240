"""`python -m rewrite` is the command `rewrite`: the current folder is no place of modules."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python -m` puts the current folder first: a file called transformers.py in it would run.
    if sys.path and Path(sys.path[0]).resolve() == Path.cwd() and not sys.flags.safe_path:
        del sys.path[0]
    from rewrite.cli.main import main

    sys.exit(main())

"""Training after a rewrite: losses, schedules and groups for any loop, and the loop of `recover`.

The public names stand in `__init__.pyi`, and each is imported with its first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

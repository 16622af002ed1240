"""Captured models, to read and to edit: the interface for authors of passes.

The names of the interface stand in `__init__.pyi`; each is imported with its first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

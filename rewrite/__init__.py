"""Rewrite trained PyTorch models: swap, fold, reparameterize; prove it; export it.

The public names stand in `__init__.pyi`: type checkers read them there, and so does `lazy_loader`,
which imports each with its first use. Importing `rewrite` alone imports no torch.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

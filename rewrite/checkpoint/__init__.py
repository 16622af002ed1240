"""Load and save models and state dicts without running code from files.

Files name the stand-ins of modules that cannot be pickled as `rewrite.checkpoint.NAME`, wherever in
this package they are defined. They are imported with their first use: what judges files
(`rewrite.checkpoint.vetting`) runs before torch is imported.
"""

import lazy_loader  # type: ignore[import-untyped]  # it ships no types

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"graph_format": ["SavedForward", "SavedGraph", "SavedParametrized"]}
)

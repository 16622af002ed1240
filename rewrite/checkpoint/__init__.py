"""Load and save models and state dicts without running code from files.

Files name the stand-ins of modules that cannot be pickled as `rewrite.checkpoint.NAME`, wherever in
this package they are defined.
"""

from rewrite.checkpoint.graph_format import SavedForward, SavedGraph, SavedParametrized

__all__ = ["SavedForward", "SavedGraph", "SavedParametrized"]

for _kind in (SavedForward, SavedGraph, SavedParametrized):
    _kind.__module__ = __name__

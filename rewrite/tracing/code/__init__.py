"""Static analysis of a module class's source: uses of submodules other than calls."""

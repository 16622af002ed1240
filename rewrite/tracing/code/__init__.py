"""The source of a module class: what its code does with submodules beside calling them."""

"""Judge a file before torch is imported: structure, names and sizes, as text and numbers."""

"""Checkpoint folders in the layout of Hugging Face: open them, check them, build their model."""

"""A checkpoint folder as Hugging Face writes it: opened, checked, built."""

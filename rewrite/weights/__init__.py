"""A layer's weight: its layout, its fans, and what computes it."""

"""Affine maps y = s.x + t per channel, moved through a graph until layers absorb them."""

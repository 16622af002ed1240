"""Parallel linear branches that are added up, and the one convolution that computes their sum."""

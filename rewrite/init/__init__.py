"""Initialization: schemes, gains, fans, residual branches, data-dependent variance."""

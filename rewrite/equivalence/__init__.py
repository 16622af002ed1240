"""Numerical equivalence of two models, judged in float64, and where they first diverge."""

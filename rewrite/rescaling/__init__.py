"""Rescaling: the positive scales that a homogeneous network does not notice, and norms that agree.

relu(d x) = d relu(x) for d > 0,   so   W₂ relu(W₁ x) = (W₂ D⁻¹) relu((D W₁) x)
"""

"""Rescaling: positive scales of channels that leave a network's function as it is, and path norms.

relu(d x) = d relu(x) for d > 0,   so   W₂ relu(W₁ x) = (W₂ D⁻¹) relu((D W₁) x)
"""

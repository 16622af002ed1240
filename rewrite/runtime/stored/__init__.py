"""Inputs from files: numpy arrays, saved tensors, and shapes written as text."""

"""Batches of a user's data."""

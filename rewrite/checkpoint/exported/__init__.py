"""Exported programs (`.pt2`) rebuilt from vetted JSON and raw tensors."""

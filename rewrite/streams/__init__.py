"""Residual streams: what writes to them, what reads them, and a change of their basis."""

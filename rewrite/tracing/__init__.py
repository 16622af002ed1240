"""Symbolic tracing of forwards into graphs, and a record of what could not be traced."""

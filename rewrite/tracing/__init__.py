"""Forwards as graphs: the tracer, what flows through it, and what no trace can say."""

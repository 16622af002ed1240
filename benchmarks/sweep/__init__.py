"""The parts of the coverage sweep: what to count, one row a model, worker processes, the table."""

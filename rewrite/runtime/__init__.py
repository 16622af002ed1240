"""Running a model without changing it."""

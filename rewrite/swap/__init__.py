"""Another norm in the place of a BatchNorm, keeping what the model learned."""

"""Are two models equal: judged in float64, located where they part."""

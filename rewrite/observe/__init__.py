"""The observed road: evidence from exported example calls, where symbolic tracing cannot enter."""

"""Evidence from exported example calls (`torch.export`), where symbolic tracing cannot enter."""

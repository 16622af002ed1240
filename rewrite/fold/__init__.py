"""Which norms go where: candidates, decisions, recipes and their replay."""

"""What the code of a model says beside its observed calls: the lines that none of them took."""

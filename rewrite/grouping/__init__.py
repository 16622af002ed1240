"""What a group of channels loses to its mean, and how to lose less."""

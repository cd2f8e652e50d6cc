"""What a model makes of held-out data and of a prompt."""

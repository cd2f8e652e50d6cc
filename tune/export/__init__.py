"""What leaves a run: for now, the card beside its adapter."""

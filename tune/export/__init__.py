"""What leaves a run: for now, the adapter folder and its card."""

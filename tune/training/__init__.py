"""Training: the step, the loop around it, and what makes a run survive its process."""

"""Training: the step, the loop around it, and what makes a run survive its process."""

import tune.kernels  # noqa: F401  imports bitsandbytes quietly, before peft or transformers do

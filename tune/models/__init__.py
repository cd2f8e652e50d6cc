"""Base models: which families are known, and how one is loaded, streamed and quantised."""

import tune.kernels  # noqa: F401  imports bitsandbytes quietly, before peft or transformers do

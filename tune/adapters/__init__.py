"""Adapters: what is injected into a base, how it is saved and read, and the gate that checks it is all there."""

import tune.kernels  # noqa: F401  imports bitsandbytes quietly, before peft or transformers do

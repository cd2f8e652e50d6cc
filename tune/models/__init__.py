"""Base models: which families are known, and how one is loaded, streamed and quantised."""

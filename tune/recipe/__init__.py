"""The recipe: what a person asks for, as YAML and as frozen objects. Imports neither torch nor transformers."""

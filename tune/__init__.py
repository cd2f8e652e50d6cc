"""Parameter-efficient fine-tuning from one recipe: `from tune import load_recipe, train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune.recipe.load import load_recipe
    from tune.run import train

__all__ = ["__version__", "load_recipe", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import tune` and the command line start without torch.
    if name == "load_recipe":
        from tune.recipe.load import load_recipe

        return load_recipe
    if name == "train":
        from tune.run import train

        return train
    raise AttributeError(f"module 'tune' has no attribute {name!r}")

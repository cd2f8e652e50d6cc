"""The versions of what decides a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

import tune

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def versions() -> dict[str, str]:
    """Return this version, Python's, and those of the libraries that compute."""
    return {
        "tune": tune.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }

"""Operations with a slow, obviously right reference beside the fast path, each behind one public name.

Importing this package imports bitsandbytes, quietly: on a CPU with AVX512-bf16 it would look for an inference
kernel on the Hub through the `kernels` package (a download that training never uses) and warn when it is absent.
"""

from __future__ import annotations

import logging
import sys


def _import_bitsandbytes() -> None:
    if "bitsandbytes" in sys.modules:
        return
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    absent = object()
    kernels = sys.modules.get("kernels", absent)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if kernels is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = kernels  # type: ignore[assignment]


_import_bitsandbytes()

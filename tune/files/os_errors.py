"""What the operating system refuses, in words: no space, no permission, a disk that is read-only or gone."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from tune.errors import RunError


@contextlib.contextmanager
def explain_os_errors(path: Path, remedy: str = "", place: str = "the recipe's output") -> Iterator[None]:
    """Turn what a user can mend (no space, no permission, a read-only or vanished disk) into a RunError.

    Args:
        path: named where an error names no file of its own.
        remedy: what to do when the cause is gone.
        place: what the user gave as the place that was written to.
    """
    words = {
        errno.ENOSPC: "no space left on the device. Free some",
        errno.EDQUOT: "the disk quota is used up. Free some space",
        errno.EACCES: f"no permission to write. Change the permissions or {place}",
        errno.EPERM: f"writing is not permitted. Change {place}",
        errno.EROFS: f"the file system is read-only. Change {place}",
        errno.ENOTDIR: f"a part of this path is a file, not a folder. Change {place}",
        errno.EEXIST: f"a file is in the way. Change {place}",
        errno.ENAMETOOLONG: f"the name is too long. Change {place}",
        errno.EFBIG: "no file here may be that large. Raise the limit (`ulimit -f`)",
        errno.EIO: "the device reports an input/output error. Check the disk",
        errno.ENOLCK: f"the file system has no locks. Put {place} on a local disk",
        errno.ENOSYS: f"the file system has no locks. Put {place} on a local disk",
        errno.ESTALE: "the network file system has gone. Mount it again",
        errno.ENOTCONN: "the file system has gone. Mount it again",
        errno.ENODEV: "the device has gone. Mount it again",
        errno.ENXIO: "the device has gone. Mount it again",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in words:
            raise
        ending = f", then {remedy}." if remedy else "."
        raise RunError(f"{error.filename or path}: {words[error.errno]}{ending}") from error

"""Read a file of a folder from anywhere as a whole: a device or a pipe has no end."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

# Far more than any text beside weights has, and no more than a computer has memory.
_MOST_BYTES = 1 << 30


def read_whole(path: Path) -> bytes:
    """The content of a regular file, or of one that a link leads to.

    Raises:
        OSError: it cannot be read, is of another kind, or has more than a gigabyte.
    """
    status = path.stat()  # before it is opened: opening a pipe waits for its other end
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    if status.st_size > _MOST_BYTES:
        raise OSError(
            errno.EFBIG,
            f"it has {status.st_size:,} bytes, and at most {_MOST_BYTES:,} are read",
            str(path),
        )
    return path.read_bytes()

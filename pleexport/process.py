"""What the system says about this process: memory and page faults."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Resident memory in bytes; None where the system does not tell.

    Attributes:
        anonymous: heap and the like, which cannot be dropped.
        file_backed: mapped files, which the system can drop and read again.
    """

    anonymous: int | None
    file_backed: int | None


def memory() -> Memory:
    """Resident memory now. Source: proc(5), fields RssAnon and RssFile of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return Memory(None, None)
    fields = {line.split(":")[0]: line.split()[1:] for line in lines if line.startswith("Rss")}
    anonymous, file_backed = (
        int(fields[name][0]) * 1024 if name in fields else None for name in ("RssAnon", "RssFile")
    )
    return Memory(anonymous, file_backed)


def page_faults() -> tuple[int, int]:
    """Minor and major page faults of this process so far; zeros where they are not counted."""
    if sys.platform == "win32":
        return 0, 0
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt

"""What the system says about this process: memory and page faults."""

from __future__ import annotations

from dataclasses import dataclass


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
    """Resident memory now; only Linux tells the two kinds apart.

    Source: proc(5), /proc/PID/statm, whose `shared` is RssFile and RssShmem of /proc/PID/status:
    a bundle in a tmpfs is as file-backed as any other.
    """
    import psutil  # 18 ms, for which a first token need not wait

    info = psutil.Process().memory_info()
    shared = getattr(info, "shared", None)
    if shared is None:
        return Memory(None, None)
    return Memory(info.rss - shared, shared)


def page_faults() -> tuple[int, int]:
    """Minor and major page faults of this process so far; zeros where they are not counted."""
    try:
        import resource
    except ImportError:  # Windows
        return 0, 0
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt

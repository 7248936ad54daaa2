"""Many runners on one bundle, in one process and in many: `python tests/crowd.py BUNDLE`.

Prints one JSON object. All answers are compared with those of a single runner. Memory is in bytes;
that of mapped files is counted as proportional shares (Pss), so that what is shared counts once.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pleexport
from pleexport.process import memory

IDS = [3, 4, 5, 60, 7]


def share(bundle: Path, packed: Path | None) -> dict[str, int]:
    """Of each mapped file of a bundle or of packed weights, this process's share."""
    found: dict[str, int] = {}
    name = None
    folders = tuple(str(f.resolve()) for f in (bundle, packed) if f)
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)", line):
            name = Path(head[1]).name if head[1].startswith(folders) else None
        elif name and line.startswith("Pss:"):
            found[name] = found.get(name, 0) + 1024 * int(line.split()[1])
    return found


def held() -> dict[str, int]:
    """What this process holds now."""
    gc.collect()
    own = Path("/proc/self")
    maps = [line.split(maxsplit=5) for line in (own / "maps").read_text("utf-8").splitlines()]
    return {
        "anonymous": memory().anonymous or 0,
        "files": len(os.listdir(own / "fd")),
        "threads": len(os.listdir(own / "task")),
        # Of files: the allocator's own come and go.
        "maps": sum(len(fields) == 6 and fields[5].startswith("/") for fields in maps),
    }


def runner(bundle: Path, packed: Path | None) -> pleexport.Runner:
    return pleexport.Runner(bundle, threads=1, packed_weights=packed)


def answer(one: pleexport.Runner) -> str:
    """A digest of logits and of a text, and every row looked up."""
    logits = one.logits(IDS)
    text = [t.id for t in one.generate(IDS, max_new_tokens=8, greedy=True, ignore_eos=True)]
    one.blob.lookup(one.blob.row_ids(range(one.blob.num_rows)))
    return hashlib.sha256(logits.tobytes() + repr(text).encode()).hexdigest()


def in_processes(count: int, bundle: Path, packed: Path | None) -> list[dict[str, Any]]:
    """Open a bundle in so many processes at once; what each one answers and holds.

    No process goes on before all have answered, so that all are there when memory is counted.
    """
    ready, go, results = os.pipe(), os.pipe(), []
    sys.stdout.flush()
    for _ in range(count):
        mine = os.pipe()
        if not os.fork():
            try:
                one = runner(bundle, packed)
                found = answer(one)
                os.write(ready[1], b".")
                os.read(go[0], 1)
                counted = {"answer": found, "share": share(bundle, packed), **held()}
                os.write(mine[1], json.dumps(counted).encode())
                os.write(ready[1], b".")
                os.read(go[0], 1)
            finally:
                os._exit(0)
        os.close(mine[1])
        results.append(mine[0])
    os.close(ready[1])
    for _ in range(2):  # all have answered, then all have counted
        for _ in range(count):
            assert os.read(ready[0], 1), "a process ended before its answer"
        os.write(go[1], b"." * count)
    for _ in range(count):
        os.wait()
    return [json.loads(os.read(end, 1 << 16)) for end in results]


def in_one_process(count: int, bundle: Path, packed: Path | None, *, lose: int) -> dict[str, Any]:
    """Open and close so many runners, one after the other, then open as many at once.

    Args:
        lose: bytes of each closed runner that are never given back, for `lost`.
    """
    answers = {answer(runner(bundle, packed)) for _ in range(count)}
    warm = held()
    answers |= {answer(runner(bundle, packed)) for _ in range(count)}
    closed = held()
    never_freed = [os.urandom(lose) for _ in range(count)]
    lost = held()
    del never_freed
    runners = [runner(bundle, packed) for _ in range(count)]
    answers |= {answer(one) for one in runners}
    return {
        "answers": sorted(answers),
        "share": share(bundle, packed),
        "warm": warm,
        "closed": closed,
        "lost": lost,
        "open": held(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runners", type=int, default=100)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--lose", type=int, default=0, help="bytes of each runner")
    parser.add_argument("--packed", type=Path, help="a folder for packed weights")
    given = parser.parse_args()
    # Imported once, for all forks.
    import onnxruntime  # noqa: F401

    assert pleexport.Runner

    # Processes first: what forks has no threads yet.
    processes = in_processes(given.processes, given.bundle, given.packed)
    one = in_one_process(given.runners, given.bundle, given.packed, lose=given.lose)
    print(json.dumps({"processes": processes, "one": one}))


if __name__ == "__main__":
    main()

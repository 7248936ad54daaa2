"""Kill builds, fill their disk and let it fail, hundreds of times: `make kills`.

Each run begins in a new folder, meets its trouble at a random moment, and is looked at: nothing
there opens that is not whole, an older bundle is as it was, an error is one sentence. Then the same
is done without trouble, which has to work and to leave nothing else. What is tried is a build, a
build over an older bundle, weights that are packed, files that are fetched into the cache, and a
build that is compared with the original before it replaces an older one. With
`--backend executorch` it is the builds alone, of ExecuTorch programs.

Runs are forks of one process that has imported everything and traced the model once, since that
takes most of the time of a small build and writes nothing. They run under `failing_disk.c`, which
sees calls of libc; `strace -f` shows whether a process makes others.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
LIBRARY = "PLEEXPORT_TEST_DISK"
EIO, ENOSPC = 5, 28
FAIL_ONCE, FAIL_FROM, KILL = 1, 2, 3
IDS = "3,4,5"
URL = "memory://bucket/model"
OPTIONS = {
    "onnx": ["--weight-dtype", "int4", "--block-size", "16"],
    "executorch": ["--backend", "executorch", "--weight-dtype", "int8"],
}


@dataclass(frozen=True)
class Task:
    """Something that writes.

    Attributes:
        run: does it, in a folder.
        left: where it leaves one thing that is not hidden.
    """

    name: str
    run: Callable[[Path], object]
    begin: Callable[[Path], object]
    check: Callable[[Path], str | None]
    left: str


@dataclass
class Trouble:
    """What happens to a run, and at which call or second."""

    kind: str
    at: int = 0
    mode: int = 0
    error: int = EIO
    seconds: float | None = None
    loses_power: bool = False
    on_small_disk: bool = False


@dataclass
class Done:
    """How a run ended; the log has a line for each call: name, inode, whether it failed, path."""

    code: int
    words: str
    seconds: float
    log: list[list[str]] = field(default_factory=list)


def cli(*arguments: object) -> None:
    from pleexport.cli import main

    sys.argv = ["pleexport", *map(str, arguments)]
    main()


class Made:
    """What all runs begin with: a checkpoint, a bundle of it, and what that answers."""

    def __init__(self, folder: Path, backend: str) -> None:
        from checkpoints import FULL, SLIDING, gemma4

        layers = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 0}
        self.checkpoint = gemma4(folder / "checkpoint", **layers)
        self.old, self.backend = folder / "old", backend
        with trace_once(backend):
            rows = ["--table-dtype", "fp32"]
            cli(
                "build", self.checkpoint, "--out", self.old, *OPTIONS[backend], *rows, "--no-verify"
            )
        if backend == "onnx":  # a program in this process would start threads, which no fork has
            self.prepare_pack_and_fetch()

    def prepare_pack_and_fetch(self) -> None:
        import fsspec

        import pleexport

        self.expected = pleexport.Runner(self.old, threads=1).logits([3, 4, 5])
        self.store = fsspec.filesystem("memory")
        for path in self.checkpoint.iterdir():
            self.store.pipe(f"/bucket/model/{path.name}", path.read_bytes())

    def tasks(self) -> list[Task]:
        builds = [
            Task("build", self.build, lambda _: None, self.bundle_is_whole, "."),
            Task("overwrite", self.build, self.put_old, self.old_or_new, "."),
        ]
        others = [
            Task("pack", self.pack, lambda _: None, self.packed_are_whole, "packed"),
            Task("fetch", self.fetch, lambda _: None, self.fetched_are_whole, "cache"),
        ]
        compare = Task("compare", self.compare, self.put_old, self.old_or_new, ".")
        return [*builds, *(others if self.backend == "onnx" else ()), compare]

    def build(self, folder: Path) -> None:
        self.compare(folder, "--no-verify")

    def compare(self, folder: Path, *more: str) -> None:
        """A build that is compared with the original before it takes its place."""
        options = [*OPTIONS[self.backend], "--overwrite", *more]
        cli("build", self.checkpoint, "--out", folder / "out", *options)

    def put_old(self, folder: Path) -> None:
        shutil.copytree(self.old, folder / "out")

    def pack(self, folder: Path) -> None:
        cli("run", self.old, "--ids", IDS, "--max-new-tokens", 1, "--packed-weights",
            folder / "packed")  # fmt: skip

    def fetch(self, folder: Path) -> None:
        from pleexport.checkpoint.remote import find_remote
        from pleexport.errors import PleexportError
        from pleexport.progress import Progress

        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        try:
            remote = find_remote(URL)
            assert remote is not None
            remote.fetch(Progress(quiet=True))
        except PleexportError as err:
            print(f"error: {err.message}", file=sys.stderr)
            raise SystemExit(err.exit_code) from None

    def bundle_is_whole(self, folder: Path) -> str | None:
        return not_whole(folder / "out") if (folder / "out").exists() else None

    def old_or_new(self, folder: Path) -> str | None:
        return not_whole(folder / "out")

    def packed_are_whole(self, folder: Path) -> str | None:
        import numpy as np

        import pleexport
        from pleexport.errors import PleexportError

        if not visible(folder / "packed"):
            return None
        try:
            runner = pleexport.Runner(self.old, threads=1, packed_weights=folder / "packed")
        except PleexportError as err:
            return err.message
        close = np.allclose(runner.logits([3, 4, 5]), self.expected, atol=1e-4)
        return None if close else "packed weights give other logits"

    def fetched_are_whole(self, folder: Path) -> str | None:
        caches = folder / "cache" / "pleexport"
        for path in caches.glob("*/*") if caches.is_dir() else ():
            if path.name.startswith("."):
                continue
            if path.read_bytes() != (self.checkpoint / path.name).read_bytes():
                return f"`{path.name}` of the cache is not what was fetched"
        return None


@contextmanager
def trace_once(backend: str) -> Iterator[None]:
    """Let all builds of this process take the trace of the one in the body."""
    from pleexport.backends.onnx import lower
    from pleexport.families import trace

    real, found = trace.trace, []

    def traced(*arguments: Any) -> Any:
        found.append(real(*arguments))
        return found[-1]

    trace.trace = traced
    with suppress(SystemExit):
        yield
    trace.trace = lambda *_: found[0]
    if backend == "onnx":
        graph = lower.translate(found[0])  # each run is a fork, and changes its own
        lower.translate = lambda _: graph


def not_whole(place: Path) -> str | None:
    """Why a folder is no whole bundle."""
    import pleexport
    from pleexport.errors import PleexportError

    try:
        bundle = pleexport.Bundle(place)
        bundle.verify_files()
        bundle.open_blob().verify()
    except PleexportError as err:
        return err.message
    return None


def visible(folder: Path) -> list[Path]:
    """What a folder holds that is not hidden."""
    return [p for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else []


def hidden_below(folder: Path) -> list[str]:
    """Litter: hidden names, and whatever lies in the folder for scratch."""
    names = [p for p in folder.rglob("*") if p.name.startswith(".") or p.parent == folder / "tmp"]
    return [str(p.relative_to(folder)) for p in names]


def run(task: Task, folder: Path, trouble: Trouble) -> Done:
    """Do a task in a process of its own, and let trouble come."""
    logs = folder.parent / "logs"
    logs.mkdir(exist_ok=True)
    log, words = logs / f"{folder.name}.log", logs / f"{folder.name}.txt"
    log.unlink(missing_ok=True)
    words.touch()
    (folder / "tmp").mkdir(exist_ok=True)
    begin = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            descriptor = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            tempfile.tempdir = str(folder / "tmp")
            have_room_at_first()
            disk(folder, trouble, log)
            task.run(folder)
            code = 0
        except SystemExit as err:
            code = err.code if isinstance(err.code, int) else 70
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if trouble.seconds is not None:
        time.sleep(trouble.seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    lines = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    return Done(
        os.waitstatus_to_exitcode(status), words.read_text(), time.monotonic() - begin, lines
    )


def have_room_at_first() -> None:
    """Say once that there is room, since otherwise nothing would begin on a small disk."""
    ask, plenty = shutil.disk_usage, [SimpleNamespace(free=1 << 40)]
    shutil.disk_usage = lambda path: plenty.pop() if plenty else ask(path)


def disk(folder: Path, trouble: Trouble, log: Path) -> None:
    """Tell the library that was loaded first what happens below a folder."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    where = os.fsencode(folder.resolve())
    library.disk(where, trouble.mode, ctypes.c_long(trouble.at), trouble.error, os.fsencode(log))


def lose_power(folder: Path, log: list[list[str]], chance: random.Random) -> None:
    """Cut what was written and not synced, and remove names that no sync of a folder has kept."""
    unsynced: set[int] = set()
    unnamed: dict[int, str] = {}
    named: set[int] = set()
    places: dict[int, str] = {}
    for call, inode, failed, path in log:
        number = int(inode)
        if failed == "1":
            continue
        if call in ("fsync", "fdatasync"):
            unsynced.discard(number)
            kept = {i for i, parent in unnamed.items() if parent == path}
            named |= kept
            unnamed = {i: parent for i, parent in unnamed.items() if i not in kept}
        elif call.startswith(("write", "pwrite", "sendfile", "copy_file", "ftruncate")):
            unsynced.add(number)
            if places.setdefault(number, path) != path:  # the number of a file that is gone
                places[number] = path
                named.discard(number)
                unnamed.pop(number, None)
            if number not in named:
                unnamed.setdefault(number, os.path.dirname(path))
    for path in folder.rglob("*"):
        inode = path.lstat().st_ino
        if not path.is_file() or path.parent == folder / "tmp":
            continue
        if inode in unnamed:
            path.unlink()
        elif inode in unsynced:
            os.truncate(path, chance.randint(0, path.stat().st_size))


def troubles(kind: str, usual: Done, chance: random.Random) -> Trouble:
    """Trouble at a random moment of a run that usually goes so."""
    calls = len(usual.log)
    # Half of them at the end, where all is synced and takes its place, or just behind it.
    late = kind == "killed" and chance.random() < 0.5
    at = chance.randint(max(1, calls - 20), calls + 5) if late else chance.randint(1, calls)
    if kind == "killed" and chance.random() < 0.4:
        return Trouble(kind, seconds=chance.uniform(0, usual.seconds))
    if kind == "killed":
        return Trouble(kind, mode=KILL, at=at, loses_power=chance.random() < 0.5)
    if kind == "full" and os.geteuid() == 0:
        return Trouble(kind, on_small_disk=True)
    mode = FAIL_FROM if kind == "full" else chance.choice([FAIL_ONCE, FAIL_FROM])
    return Trouble(kind, mode=mode, at=at, error=ENOSPC if kind == "full" else EIO)


@contextmanager
def small_disk(folder: Path, trouble: Trouble) -> Iterator[Callable[[int], None]]:
    """A file system of its own at a folder, where there is to be one; gives what sets its size."""
    if not trouble.on_small_disk:
        yield lambda _: None
        return
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def used(folder: Path) -> int:
    return sum(p.stat().st_blocks * 512 for p in folder.rglob("*"))


def try_once(
    task: Task, folder: Path, trouble: Trouble, size: int, chance: random.Random
) -> Iterator[str]:
    """Let trouble come to a task; what is wrong afterwards, as sentences."""
    folder.mkdir()
    with small_disk(folder, trouble) as resize:
        task.begin(folder)
        before = contents(folder / "out")
        resize(used(folder) + chance.randint(1, size // 4096) * 4096)
        done = run(task, folder, trouble)
        resize(1 << 30)
        if trouble.loses_power:
            lose_power(folder, done.log, chance)
        if wrong := task.check(folder):
            yield f"not whole: {wrong}"
        after = contents(folder / "out")
        if done.code not in (0, -signal.SIGKILL):
            if after != before and not cannot_go_back(trouble, done, folder):
                yield "what was there before is not what is there now"
            if done.code != 2 or "Traceback" in done.words:
                yield f"exit code {done.code}: {done.words[-400:]}"
            if "error: " not in done.words:
                yield f"no sentence: {done.words[-400:]}"
            if trouble.kind == "full" and "no space left" not in done.words:
                yield f"another sentence: {done.words[-400:]}"
            if left := hidden_below(folder):
                yield f"a failure left {left[0]}"
        elif done.code == 0:
            yield from (f"a failing {call} was passed over" for call in failed_calls(done))
        following = run(task, folder, Trouble("none"))
        if following.code:
            yield f"the next one fails: {following.words[-400:]}"
        if wrong := task.check(folder):
            yield f"the next one is not whole: {wrong}"
        if left := hidden_below(folder):
            yield f"the next one leaves {left[0]}"
        found = [p.name for p in (folder / task.left).iterdir() if p.name != "tmp"]
        if len(found) != 1:
            yield f"the next one leaves {sorted(found)}"


def cannot_go_back(trouble: Trouble, done: Done, folder: Path) -> bool:
    """Whether a disk took a new name, and failed for good when this was to be synced."""
    failed = [(call, path) for call, _, fails, path in done.log if fails == "1"]
    return trouble.mode == FAIL_FROM and failed[:1] == [("fsync", str(folder.resolve()))]


def failed_calls(done: Done) -> list[str]:
    """What failed of a run; making a folder that is there already may."""
    return [call for call, _, failed, _ in done.log if failed == "1" and call != "mkdir"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else {}


def campaign(made: Made, folder: Path, *, counts: dict[str, int], seed: int) -> list[str]:
    """Let each kind of trouble come so many times, to the tasks in turn; what was wrong."""
    # Those that trouble comes to, as the later ones take longer.
    chance, tasks, wrong = random.Random(seed), made.tasks()[: max(counts.values())], []
    usual, sizes = {}, {}
    for task in tasks:
        place = folder / f"usual-{task.name}"
        place.mkdir()
        task.begin(place)
        usual[task.name] = run(task, place, Trouble("none"))
        assert usual[task.name].code == 0, usual[task.name].words
        sizes[task.name] = used(place)
        calls = len(usual[task.name].log)
        print(f"{task.name}: {calls} calls, {usual[task.name].seconds:.1f} s as usual", flush=True)
    ends: Counter[str] = Counter()
    for kind, count in counts.items():
        for number in range(count):
            task = tasks[number % len(tasks)]
            trouble = troubles(kind, usual[task.name], chance)
            place = folder / f"{kind}-{number}"
            found = list(try_once(task, place, trouble, sizes[task.name], chance))
            for problem in found:
                wrong.append(f"{task.name}, {trouble}: {problem}")
                print(wrong[-1], flush=True)
            ends[f"{task.name} {kind}: {'WRONG' if found else 'right'}"] += 1
            if not found:
                shutil.rmtree(place)
    for end, count in sorted(ends.items()):
        print(f"{end} {count} times")
    return wrong


def under_library(folder: Path) -> None:
    """Start this process again with the library loaded first, unless it is."""
    if LIBRARY in os.environ:
        return
    library = folder / "failing_disk.so"
    source = str(HERE / "failing_disk.c")
    subprocess.run(
        ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True
    )
    more = {LIBRARY: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | more)


def break_what(name: str) -> None:
    """Take a part of the care away, so that a campaign has something to find."""
    from pleexport import staging
    from pleexport.export import builder

    @contextmanager
    def in_place(place: Path, **_: Any) -> Iterator[Path]:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield place

    if name == "staging":
        builder.staged_folder = in_place
    elif name == "sync":
        staging._sync = lambda _: None
    elif name == "cleaning":
        staging._clean_up = lambda *_, **__: None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for kind, count in (("killed", 200), ("full", 50), ("failing", 50)):
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"runs; {count} by default")
    parser.add_argument("--backend", choices=list(OPTIONS), default="onnx", help="of the builds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--break", dest="broken", choices=["staging", "sync", "cleaning"], default=""
    )
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "kills")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    under_library(given.out)
    import torch

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=given.out))
    made = Made(folder, given.backend)
    break_what(given.broken)
    counts = {"killed": given.killed, "full": given.full, "failing": given.failing}
    wrong = campaign(made, folder, counts=counts, seed=given.seed)
    print(
        f"{sum(counts.values())} runs, {len(wrong)} things wrong" + f"; see {folder}" * bool(wrong)
    )
    if not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

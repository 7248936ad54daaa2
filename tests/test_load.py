"""Many runners, many processes, and a bundle that is replaced under them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest
import soak
from crowd import answer, runner

import pleexport
from pleexport.backends.onnx import packing
from pleexport.errors import BundleError, InputError
from pleexport.runtime.blob import Blob
from pleexport.staging import staged_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
# What closed runners may leave: pages, and what an allocator keeps. That levels off after some 40
# runners, and so few as 6 are still on the way there. Programs leave pieces of other sizes.
FEW, MANY, PROGRAMS = 4 << 20, 1 << 20, 2 << 20


def crowd(
    bundle: Path, *, runners: int, processes: int, packed: Path | None, slack: int
) -> dict[str, Any]:
    """What many runners answered and held, and that of one; in `lost` each has lost something."""
    command = [sys.executable, str(Path(__file__).with_name("crowd.py")), str(bundle)]
    counts = ["--runners", str(runners), "--processes", str(processes)]
    counts += ["--lose", str(3 * slack // runners)]
    more = ["--packed", str(packed)] if packed else []
    done = subprocess.run([*command, *counts, *more], check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("runners", "processes", "is_packed", "slack"),
    [
        (6, 3, True, FEW),
        pytest.param(100, 20, False, MANY, marks=pytest.mark.slow),
        pytest.param(100, 20, True, MANY, marks=pytest.mark.slow),
    ],
)
def test_many_runners_answer_as_one_and_share_the_files(
    runners: int, processes: int, is_packed: bool, slack: int, gemma4_bundle: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed" if is_packed else None
    found = crowd(gemma4_bundle, runners=runners, processes=processes, packed=packed, slack=slack)
    answers = [one["answer"] for one in found["processes"]]
    assert set(answers) == set(found["one"]["answers"]) == {answer(runner(gemma4_bundle, packed))}
    assert len(answers) == processes
    # All together hold each file once. Other runners of one process do too.
    shares = [one["share"] for one in found["processes"]]
    mapped = [gemma4_bundle / "embeddings.safetensors"]
    if packed:
        mapped += packed.glob("*/model.onnx.data")
        assert len(list(packed.iterdir())) == 1  # although all of them wrote it at once
    for file in mapped:
        once = file.stat().st_size + (4096 * processes)
        for held in (shares, [found["one"]["share"]]):
            # A file that is not mapped has no share; many small shares are rounded to none.
            assert sum(share[file.name] for share in held) <= once
    check_nothing_stays(found["one"], slack=slack)
    closed, all_open = found["one"]["closed"], found["one"]["open"]
    # The control: what is open is seen.
    assert all_open["anonymous"] > closed["anonymous"] + 2 * slack
    assert all_open["maps"] >= closed["maps"] + runners


def check_nothing_stays(one: dict[str, Any], *, slack: int) -> None:
    """Closed runners leave no memory, files or threads; what each would lose is seen."""
    warm, closed, lost = (one[name] for name in ("warm", "closed", "lost"))
    assert closed["anonymous"] <= warm["anonymous"] + slack
    assert lost["anonymous"] > warm["anonymous"] + slack
    for name in ("files", "threads", "maps"):
        assert closed[name] == warm[name], name


@pytest.fixture(scope="module")
def programs(
    gemma4_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two bundles of ExecuTorch with other weights; read only."""
    pytest.importorskip("executorch", reason="pip install 'pleexport[executorch]'")
    folder = tmp_path_factory.mktemp("programs")
    for dtype in ("fp32", "int8"):
        pleexport.build(
            gemma4_checkpoint,
            folder / dtype,
            backend="executorch",
            weight_dtype=dtype,
            context=64,
            verify=False,
        )
    return folder / "fp32", folder / "int8"


@pytest.mark.slow
def test_many_runners_of_a_program_answer_as_one(programs: tuple[Path, Path]) -> None:
    found = crowd(programs[0], runners=40, processes=4, packed=None, slack=PROGRAMS)
    answers = [one["answer"] for one in found["processes"]]
    assert set(answers) == set(found["one"]["answers"]) == {answer(runner(programs[0], None))}
    assert len(answers) == 4
    check_nothing_stays(found["one"], slack=PROGRAMS)


@pytest.mark.slow
def test_a_program_that_is_replaced_while_it_is_open_keeps_serving(
    programs: tuple[Path, Path], tmp_path: Path
) -> None:
    old, new = programs
    place = Path(shutil.copytree(old, tmp_path / "place"))
    first = runner(place, None)
    replace(place, new)
    assert answer(first) == answer(runner(old, None))
    assert answer(runner(place, None)) == answer(runner(new, None)) != answer(first)


def replace(place: Path, by: Path) -> None:
    """Do what a build with `--overwrite` does at its end."""
    with staged_folder(place, error=BundleError, elsewhere="", check=lambda: None) as staging:
        shutil.copytree(by, staging, dirs_exist_ok=True)


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_bundle_that_is_replaced_while_it_is_open_keeps_serving_the_old_one(
    is_packed: bool, gemma4_bundle: Path, gemma3n_bundle: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(gemma4_bundle, tmp_path / "place"))
    packed = tmp_path / "packed" if is_packed else None
    expected = answer(runner(gemma4_bundle, packed))
    first = runner(place, packed)
    replace(place, gemma3n_bundle)
    assert answer(first) == expected  # with rows that nobody read before
    # Who opens it now gets the new one.
    assert answer(runner(place, packed)) == answer(runner(gemma3n_bundle, packed)) != expected


@pytest.mark.parametrize(
    ("free", "said"), [(0, "no space left on device"), (1 << 40, "output error")]
)
def test_packed_weights_that_cannot_be_written_are_no_damaged_bundle(
    free: int, said: str, gemma4_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_graph, rooms = packing.open_graph, iter([1 << 40, free])

    def fail(graph: Path, options: ort.SessionOptions) -> object:
        if options.optimized_model_filepath:  # as ONNX Runtime does it on a disk that fails
            raise BundleError(f"`{graph}` cannot be loaded: serialization failed")
        return open_graph(graph, options)

    monkeypatch.setattr(packing, "open_graph", fail)
    room = lambda _: SimpleNamespace(free=next(rooms))  # noqa: E731
    monkeypatch.setattr(packing.shutil, "disk_usage", room)
    with pytest.raises(InputError, match=f"cannot be written: .*{said}"):
        runner(gemma4_bundle, tmp_path / "packed")
    assert list((tmp_path / "packed").iterdir()) == []


def test_a_soak_notices_what_grows() -> None:
    def held(count: int, **grown: int) -> soak.Held:
        flat = {"anonymous": 50 << 20, "file_backed": 0, "files": 8, "threads": 2, "maps": 500}
        return soak.Held(minutes=count, texts=count, **(flat | grown))

    assert soak.growth([held(i) for i in range(40)]) == []
    # What grows while it warms up has settled.
    assert soak.growth([held(i, anonymous=min(i, 8) << 20) for i in range(40)]) == []
    grown = [held(i, anonymous=i << 20, files=i, threads=i) for i in range(40)]
    assert [clause.split()[0] for clause in soak.growth(grown)] == ["files", "threads", "memory"]


def test_a_soak_compares_every_text(gemma4_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", ([3, 4], [5]))
    monkeypatch.setattr(soak, "WAYS", ({"greedy": True, "ignore_eos": True},))
    assert soak.soak(gemma4_bundle, seconds=0.5, every=0.1, packed=None)
    lookup = Blob.lookup
    calls = iter(range(10**9))

    def wrong_later(self: Any, *arguments: Any) -> Any:
        wrong = 1 + next(calls) // 50
        return {name: wrong * values for name, values in lookup(self, *arguments).items()}

    monkeypatch.setattr(Blob, "lookup", wrong_later)
    with pytest.raises(AssertionError):
        soak.soak(gemma4_bundle, seconds=60, every=1, packed=None)

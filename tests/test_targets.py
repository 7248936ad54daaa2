"""Targets: the files that ship, and what is said about malformed ones."""

from __future__ import annotations

from pathlib import Path

import arm64
import msgspec
import pytest

from pleexport import targets
from pleexport.errors import TargetError
from pleexport.export.options import resolve
from pleexport.show.targets import describe_target

NAMES = ["android", "ios", "laptop", "raspberry-pi", "web", "web-gpu"]
OWN = """
description = "a test board"
backend = "onnx"
page_size = 65536
table_dtype = "source"
weight_dtype = "fp16"
context = 128
opset = 24
packaging = ["Copy the folder."]

[runtime]
onnxruntime = "1.32"
"""


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(OWN)
    return path


def test_names_are_those_of_the_files() -> None:
    assert targets.names() == NAMES


def test_names_in_an_installed_package_come_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "targets_data").mkdir()
    (tmp_path / "targets_data" / "board.toml").write_text(OWN)
    monkeypatch.setattr(targets, "__file__", str(tmp_path / "targets.py"))
    assert targets.names() == ["board"]
    assert targets.load("board").context == 128


@pytest.mark.parametrize("name", NAMES)
def test_load_shipped_target_is_complete(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.runtime
    assert all(step.endswith(".") for step in target.packaging)
    assert msgspec.to_builtins(target)["backend"] == "onnx"


def test_a_backend_may_have_settings_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(
        OWN + '[backends.executorch]\nblock_size = 64\nruntime = { executorch = "1" }\n'
    )
    board = targets.load(str(path))
    other = board.with_backend("executorch")
    assert (other.backend, other.block_size, other.runtime) == (
        "executorch",
        64,
        {"executorch": "1"},
    )
    assert (other.weight_dtype, other.context) == (board.weight_dtype, board.context)
    assert board.with_backend("onnx") == board
    settings = resolve({"target": str(path), "backend": "executorch"})
    assert (settings.backend, settings.weights.block_size) == ("executorch", 64)
    assert resolve({"target": str(path)}).weights.block_size == board.block_size
    told = describe_target(board)
    assert "With --backend executorch" in told
    assert "executorch 1" in told


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[backends.tflite]\nblock_size = 64\n", "backends"),
        ("[backends.executorch]\nblock_size = 48\n", "block_size"),
        ("[backends.executorch]\npage_size = 16384\n", "page_size"),
    ],
)
def test_settings_of_a_backend_are_checked(table: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(OWN + table)
    with pytest.raises(TargetError, match=message):
        targets.load(str(path))


def test_load_own_file_takes_its_name_and_no_limits(own_file: Path) -> None:
    target = targets.load(str(own_file))
    assert (target.name, target.page_size, target.table_dtype) == ("board", 65536, "source")
    assert target.limits == targets.Limits()


def test_load_own_file_may_name_itself(own_file: Path) -> None:
    own_file.write_text('name = "my-board"' + OWN)
    assert targets.load(str(own_file)).name == "my-board"


def test_load_unknown_name_lists_known_and_nearest() -> None:
    with pytest.raises(TargetError) as raised:
        targets.load("andriod")
    assert raised.value.message == (
        "target `andriod` is not known; known: android, ios, laptop, raspberry-pi, web, web-gpu "
        "(the nearest name is `android`)"
    )
    assert raised.value.hint is not None
    assert ".toml" in raised.value.hint


def test_load_name_like_nothing_has_no_nearest() -> None:
    with pytest.raises(TargetError, match=r"web-gpu$"):
        targets.load("zzzz")


def test_load_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"none\.toml` does not exist") as raised:
        targets.load(str(tmp_path / "none.toml"))
    assert str(raised.value.hint).startswith("check the path;")


def test_load_folder_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TargetError, match=r"folder\.toml` cannot be read: \w+"):
        targets.load(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize("content", [b"page_size = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_load_malformed_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(TargetError, match=r"bad\.toml` is not valid TOML: "):
        targets.load(str(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("65536", '"64K"', "field `page_size`: expected `int`, got `str`"),
        ("65536", "4096", "field `page_size`: expected `int` >= 16384"),
        ("65536", "20000", "`page_size` is 20000; expected a power of two"),
        ("context = 128", "", "field `context` is missing"),
        ("context = 128", "context = 0", "field `context`: expected `int` >= 1"),
        ("context = 128", "context = 1\nextra = 2", "unknown field `extra`"),
        (
            '"fp16"',
            '"int3"',
            "field `weight_dtype`: got `int3`, expected one of source, fp32, fp16, int8, int4",
        ),
        ("opset = 24", "opset = 23", "field `opset`: got `23`, expected one of 24"),
        ("opset = 24", "opset = 24\nname = 'a/b'", "field `name`: expected `str` matching regex"),
        (
            'onnxruntime = "1.32"',
            'onnxruntime-android = "1.24.3"',
            "`onnxruntime-android` is 1.24.3; graphs of opset 24 need 1.25 or newer",
        ),
        (
            'onnxruntime = "1.32"',
            'onnxruntime = "new"',
            "`onnxruntime` is new; graphs of opset 24 need 1.25 or newer",
        ),
        (
            "[runtime]",
            "[limits]\nlargest = 1\n[runtime]",
            "field `limits`: unknown field `largest`",
        ),
        (
            "[runtime]",
            "[limits]\nmemory_budget_bytes = 0\n[runtime]",
            "field `limits.memory_budget_bytes`: expected `int` >= 1",
        ),
    ],
)
def test_load_malformed_field_is_named(own_file: Path, old: str, new: str, message: str) -> None:
    assert old in OWN
    own_file.write_text(OWN.replace(old, new))
    with pytest.raises(TargetError) as raised:
        targets.load(str(own_file))
    assert raised.value.message.startswith(f"target file `{own_file}`: {message}")
    assert raised.value.hint == "`pleexport targets android` shows a complete target"


def _limited(own_file: Path, **limits: int) -> targets.Target:
    return msgspec.structs.replace(targets.load(str(own_file)), limits=targets.Limits(**limits))


def test_exceeded_without_limits_is_empty(own_file: Path) -> None:
    target = targets.load(str(own_file))
    assert targets.exceeded(target, resident_bytes=10**15, sizes={"a": 10**15}) == []
    assert targets.delivery_notes(target, {"a": 10**15}) == []


def test_exceeded_names_limits_with_numbers(own_file: Path) -> None:
    limits = {"largest_file_bytes": 1_000_000_000, "memory_budget_bytes": 2_000_000}
    target = _limited(own_file, **limits)
    sizes = {"small": 1_000_000_000, "large": 1_250_000_000}
    assert targets.exceeded(target, resident_bytes=3_000_000, sizes=sizes) == [
        "`large` has 1.25 GB, and the largest file is 1.00 GB",
        "3.00 MB have to stay in memory, and the budget is 2.00 MB",
    ]
    assert targets.exceeded(target, resident_bytes=2_000_000, sizes={"a": 10**9}) == []


def test_delivery_notes_count_packs_and_total(own_file: Path) -> None:
    limits = {"largest_pack_bytes": 1_000_000_000, "largest_delivery_bytes": 2_000_000_000}
    notes = targets.delivery_notes(_limited(own_file, **limits), {"a": 10**9, "b": 10**9 + 1})
    assert notes == [
        "`b` has 1.00 GB: the store takes it in 2 parts of at most 1.00 GB",
        "the bundle has 2.00 GB, and the store delivers at most 2.00 GB: choose smaller dtypes, or "
        "a server of your own",
    ]


def test_exceeded_says_nothing_of_packs(own_file: Path) -> None:
    target = _limited(own_file, largest_pack_bytes=1)
    assert targets.exceeded(target, resident_bytes=9, sizes={"a": 9}) == []


@pytest.mark.parametrize("name", NAMES)
def test_render_shows_settings_and_steps(name: str) -> None:
    target = targets.load(name)
    text = describe_target(target)
    assert text.startswith(f"{name}: {target.description}\n")
    assert f"context {target.context:,} positions" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    for step in target.packaging:
        assert " ".join(step.split()) in " ".join(text.split())


def test_the_boards_target_names_what_is_run_for_it() -> None:
    """And every package of Python that is run is a locked one."""
    text = (arm64.HERE / "targets" / "raspberry-pi.toml").read_text(encoding="utf-8")
    said = " ".join(text.replace("\n#", "\n").split())
    named = (*arm64.CPUS, arm64.OLDER_ONNXRUNTIME)
    assert [word for word in named if word not in said] == []
    runtime = targets.load("raspberry-pi").runtime["onnxruntime"]
    assert f"{runtime}.0" == arm64.OLDER_ONNXRUNTIME
    entries = arm64.locked(arm64.WHEELS)
    (locked,) = [line for line in entries.splitlines() if line.startswith("onnxruntime==")]
    assert locked.removesuffix(" \\").partition("==")[2] in said
    assert "--hash=sha256:" in entries

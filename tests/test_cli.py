"""The command line, as a user meets it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_folders import save_adapter

from pleexport.errors import BundleError
from pleexport.export.builder import build
from pleexport.export.packaging import package
from pleexport.export.replacing import check_replaceable
from pleexport.staging import staged_folder

COMMANDS = ("inspect", "build", "verify", "run", "bench", "package", "targets")


def pleexport(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "pleexport", *(str(a) for a in args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "100"},
        **options,  # type: ignore[call-overload]
    )


def test_build_verify_and_run_work_end_to_end(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    built = pleexport(
        "build",
        gemma4_checkpoint,
        "--out",
        out,
        "--table-dtype",
        "source",
        "--weight-dtype",
        "fp32",
    )
    assert built.returncode == 0, built.stderr
    assert "Parity with the PyTorch original: passed" in built.stdout
    assert "warning: there is no tokenizer.json" in built.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "checksums.json",
        "embeddings.safetensors",
        "generation_config.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "parity.json",
    ]
    ran = pleexport("run", out, "--ids", "1,2,3", "--max-new-tokens", 5, "--stats")
    assert "as it was given" in ran.stderr
    assert "the likeliest token" in ran.stderr
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.split()) == 5
    assert "tokens/s" in ran.stderr
    drafted = pleexport("run", out, "--ids", "1,2,3", "--max-new-tokens", 5, "--draft", "lookup")
    assert (drafted.returncode, drafted.stdout) == (0, ran.stdout), drafted.stderr
    again = pleexport("build", gemma4_checkpoint, "--out", out)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert "holds a bundle already" in again.stderr
    report = tmp_path / "report.html"
    verified = pleexport(
        "verify", out, "--checkpoint", gemma4_checkpoint, "--report", report, "--json"
    )
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["passed"] is True
    assert "<svg" in report.read_text()
    benched = pleexport(
        "bench", out, "--prompt-tokens", "8", "--decode-tokens", 4, "--repeat", 1, "--json"
    )
    assert benched.returncode == 0, benched.stderr
    assert json.loads(benched.stdout)["timings"][0]["prompt_tokens"] == 8


def test_inspect_prints_json_and_nothing_else(gemma4_checkpoint: Path) -> None:
    result = pleexport("inspect", gemma4_checkpoint, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["family"] == "gemma4"
    assert "embed_tokens_per_layer" in pleexport("inspect", gemma4_checkpoint).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command: str) -> None:
    result = pleexport(command, "--help")
    assert result.returncode == 0
    assert f"Example: pleexport {command}" in " ".join(result.stdout.split())


def test_python_dash_m_is_the_installed_command() -> None:
    from pleexport import __main__, cli

    assert __main__.main is cli.main  # and importing it ran nothing
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="pleexport")
    assert entry.load() is cli.main
    assert pleexport("--version").stdout.strip() == importlib.metadata.version("pleexport")
    help_text = pleexport("--help").stdout
    assert help_text.startswith("Usage: python -m pleexport ")
    for command in COMMANDS:
        assert f" {command} " in help_text
    assert pleexport("biuld").returncode == 2


def test_targets_lists_and_shows() -> None:
    listed = pleexport("targets")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        "android",
        "ios",
        "laptop",
        "raspberry-pi",
        "web",
        "web-gpu",
    ]
    assert "16,384" in pleexport("targets", "android").stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "nowhere"], "`nowhere` does not exist"),
        (["build", "{checkpoint}", "--target", "androd"], "target `androd` is not known"),
        (["build", "{checkpoint}", "--table-dtype", "int3"], "table dtype `int3` is not known"),
        (["build", "{checkpoint}", "--backend", "tflite"], "backend `tflite` is not known"),
        (["build", "{checkpoint}", "--context", "999999"], "context 999999 is not possible"),
        (["build", "{checkpoint}", "--out", "{occupied}"], "exists and is not a bundle"),
        (["verify", "{checkpoint}"], "is not a bundle"),
        (["run", "{bundle}", "--prompt", "hello"], "this bundle has no tokenizer"),
        (["run", "{bundle}", "--ids", "1,x"], "`--ids` has `1,x`; expected numbers"),
        (
            ["verify", "{bundle}", "--report", "x.html"],
            "`--report` is for comparing with the original",
        ),
        (["verify", "{bundle}", "--checkpoint", "{checkpoint}", "--text", "x"], "no tokenizer"),
        (["run", "{bundle}", "--ids", "1" * 30], "a token id does not fit 64 bits"),
        (["run", "{bundle}", "--ids", "1", "--seed", "-1"], "seed is -1"),
        (["run", "{bundle}", "--ids", "1", "--tools", "nowhere"], "`nowhere`: No such file"),
        (["run", "{bundle}", "--ids", "1", "--threads", "100000"], "threads is 100000"),
        (["run", "{bundle}", "--ids", "1", "--draft", "model"], "draft `model` is not known"),
        (["bench", "{bundle}", "--prompt-tokens", "99999999"], "exceed the bundle's context"),
        (["verify", "{bundle}", "--text", "x"], "`--text` is for comparing with the original"),
        (["build", "{checkpoint}", "--out", "."], "the current folder cannot be replaced"),
        (["build", "{checkpoint}", "--block-size", "0"], "block size `0` is not known"),
        (["build", "{checkpoint}", "--block-size", "48"], "block size `48` is not known"),
        (["build", "{checkpoint}", "--out", "{occupied}/thesis.txt/x"], "is no folder that can"),
    ],
)
def test_wrong_input_gets_one_sentence_and_exit_code_2(
    args: list[str],
    message: str,
    gemma4_checkpoint: Path,
    gemma4_bundle: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("keep me")
    places = {
        "checkpoint": gemma4_checkpoint,
        "bundle": gemma4_bundle,
        "occupied": tmp_path / "occupied",
    }
    result = pleexport(*(arg.format(**places) for arg in args), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "\nhint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "occupied" / "thesis.txt").read_text() == "keep me"


@pytest.mark.parametrize("manifest", ['{"name": "a web app"}', None])
def test_overwrite_replaces_bundles_and_nothing_else(
    manifest: str | None, gemma4_bundle: Path, gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(gemma4_bundle, tmp_path / "out"))
    (out / "thesis.txt").write_text("keep me")
    if manifest is not None:
        (out / "manifest.json").write_text(manifest)
    result = pleexport("build", gemma4_checkpoint, "--out", out, "--overwrite", "--no-verify")
    assert result.returncode == 2
    assert "is not a bundle" in result.stderr or "and other things" in result.stderr
    assert (out / "thesis.txt").read_text() == "keep me"


def test_what_appears_at_the_place_of_a_bundle_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (  # noqa: PT012
        pytest.raises(BundleError, match="exists and is not a bundle"),
        staged_folder(
            out,
            error=BundleError,
            elsewhere="",
            check=lambda: check_replaceable(out, overwrite=False),
        ) as staging,
    ):
        (staging / "manifest.json").write_text("{}")
        out.mkdir()
        (out / "thesis.txt").write_text("keep me")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("inside", "said"),
    [("", "is a link to itself"), ("sub", "is no folder that can be written to")],
)
@pytest.mark.parametrize("command", ["build", "package"])
def test_a_folder_that_is_a_link_to_itself_is_refused(
    command: str,
    inside: str,
    said: str,
    gemma4_checkpoint: Path,
    gemma4_bundle: Path,
    tmp_path: Path,
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    write: Callable[[Path], object] = {
        "build": lambda out: build(gemma4_checkpoint, out, verify=False),
        "package": lambda out: package(gemma4_bundle, out, target="android"),
    }[command]
    with pytest.raises(BundleError, match=f"`{loop}` {said}"):
        write(loop / inside)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]
    # The control: a link to another place is followed, and stays.
    other = tmp_path / "other"
    other.symlink_to("place")
    write(other)
    assert other.is_symlink()
    assert any((tmp_path / "place").iterdir())


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        ("loop", "it is a link to itself"),
        ("loop/report.html", "`{folder}/loop` is not a folder"),
        ("gone/report.html", "`{folder}/gone` is not a folder"),
        (".", "it is a folder"),
    ],
)
def test_a_report_that_has_no_place_is_refused_before_the_work(
    report: str, problem: str, tmp_path: Path
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / report
    result = pleexport("verify", "bundle", "--checkpoint", "checkpoint", "--report", path)
    assert result.returncode == 2
    problem = problem.format(folder=tmp_path)
    first = f"error: `--report {path}` cannot be written: {problem}\n\nhint: "
    assert result.stderr.startswith(first)


def test_no_command_writes_outside_of_its_output(gemma4_bundle: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run(
        [sys.executable, "-m", "pleexport", "run", str(gemma4_bundle), "--ids", "1,2"],
        check=True,
        capture_output=True,
        env=environment,
    )
    assert list(tmp_path.iterdir()) == []


def test_an_interactive_session_goes_on_after_a_line_that_cannot_be_used(
    gemma4_bundle: Path,
) -> None:
    result = pleexport("run", gemma4_bundle, input="hello\nagain\n")
    assert result.returncode == 0
    assert result.stderr.count("error: this bundle has no tokenizer") == 2
    assert result.stderr.count("hint: pass token ids instead of text") == 2
    assert result.stdout == ""


def test_verify_with_another_checkpoint_says_so(
    gemma4_bundle: Path, gemma3n_checkpoint: Path
) -> None:
    result = pleexport("verify", gemma4_bundle, "--checkpoint", gemma3n_checkpoint)
    assert result.returncode == 2
    assert "was not built from" in result.stderr


def test_a_damaged_bundle_fails_with_exit_code_1(gemma4_bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(gemma4_bundle, tmp_path / "broken"))
    data = broken / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    result = pleexport("verify", broken)
    assert result.returncode == 1
    assert "the manifest says" in result.stderr
    # What only runs a bundle was given something wrong.
    ran = pleexport("run", broken, "--ids", "1,2")
    assert ran.returncode == 2
    assert "the manifest says" in ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_an_interrupted_build_leaves_nothing(gemma4_checkpoint: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pleexport", "build", str(gemma4_checkpoint), "--out", "bundle"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".bundle.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_given_by_option_and_by_their_own_folder(
    gemma4_checkpoint: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(gemma4_checkpoint, tmp_path / "adapter", target_modules=["q_proj"])
    halved = pleexport("inspect", gemma4_checkpoint, "--adapter", f"{adapter}:0.5", "--json")
    assert halved.returncode == 0, halved.stderr
    (info,) = json.loads(halved.stdout)["adapters"]
    assert (info["name"], info["weight"]) == ("adapter", 0.5)
    # Its config names the base, unless another one is given.
    for options in ([], ["--base", gemma4_checkpoint]):
        own = pleexport("inspect", adapter, *options)
        assert own.returncode == 0, own.stderr
        assert "LoRA of rank 8" in own.stdout
    nowhere = pleexport("inspect", adapter, "--base", tmp_path / "nowhere")
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("error: ")
    alone = pleexport("verify", tmp_path, "--adapter", adapter)
    assert alone.returncode == 2
    assert "`--adapter` is for comparing with the original" in alone.stderr

"""The Kotlin library against the Python one: logits, texts, and what it refuses.

Maven builds the jar once. Where there is no Maven the tests are skipped, but not in CI.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kotlin_cases
import numpy as np
import pytest
from checkpoints import gemma4
from conftest import TOLERANCE, exact_bundle, relative_error
from family_checkpoints import embformer, lckv, llama_value_embeddings
from numpy.typing import NDArray
from quantized_checkpoints import mobile_gemma4
from resealed import change_manifest
from rwkv_checkpoints import rwkv
from tokenizers_in_code import byte_fallback, save

import pleexport

PROJECT = Path(__file__).parents[1] / "android-demo" / "runtime"
JAR = PROJECT / "target" / "pleexport-runtime.jar"
# Of the range of the logits. Kernels of 8 and 4 bits round activations, each version of ONNX
# Runtime in its own way; one version moves as much when it reads a prompt in other pieces.
ROUNDED = 0.05
REQUIRED = bool(os.environ.get("CI") or os.environ.get("PLEEXPORT_REQUIRE_JVM"))


@pytest.fixture(scope="session")
def jar() -> Path:
    """The jar, built by Maven where a source has changed."""
    if not (shutil.which("mvn") and shutil.which("java")):
        why = "the Kotlin library needs a JDK 17 and Maven: `apt-get install openjdk-17-jdk maven`"
        assert not REQUIRED, why
        pytest.skip(why)
    sources = sorted([PROJECT / "pom.xml", *(PROJECT / "src").rglob("*.kt")])
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    stamp = PROJECT / "target" / "built"
    (PROJECT / "target").mkdir(exist_ok=True)
    with (PROJECT / "target" / "lock").open("w") as lock:  # other workers build too
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != state or not JAR.exists():
            maven("package", "-DskipTests")
            stamp.write_text(state)
    return JAR


def maven(*arguments: str) -> None:
    done = subprocess.run(
        ["mvn", "-q", "-B", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def java(jar: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    options = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    command = ["java", *options, "-jar", jar, *arguments, "--threads", "1"]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", check=False
    )


def logits(jar: Path, bundle: Path, ids: list[int], out: Path) -> NDArray[np.float32]:
    done = java(jar, "logits", bundle, "--ids", ",".join(map(str, ids)), "--out", out)
    assert done.returncode == 0, done.stderr
    found: NDArray[np.float32] = np.load(out)
    assert found.dtype == np.float32
    return found


def check_logits(jar: Path, bundle: Path, tolerance: float) -> None:
    runner = pleexport.Runner(bundle, threads=1)
    ids = np.random.default_rng(3).integers(0, runner.blob.num_rows, 300).tolist()
    expected, out = runner.logits(ids), bundle.parent / "logits.npy"
    assert relative_error(expected, logits(jar, bundle, ids, out)) < tolerance
    # The control: one id is another.
    ids[150] = (ids[150] + 1) % runner.blob.num_rows
    assert relative_error(expected, runner.logits(ids)) > tolerance


EXACT: dict[str, Callable[[Path], pleexport.Bundle]] = {
    "rwkv7a": lambda p: exact_bundle(rwkv(p / "m.pth", "7a"), p / "b"),
    "rwkv8-hybrid": lambda p: exact_bundle(rwkv(p / "m.pth", "8-hybrid"), p / "b"),
    "embformer": lambda p: exact_bundle(embformer(p / "c"), p / "b"),
    "llama": lambda p: exact_bundle(llama_value_embeddings(p / "c"), p / "b"),
}
SHARED: dict[str, Callable[[Path], pleexport.Bundle]] = {
    "rwkv7b": lambda p: exact_bundle(rwkv(p / "m.pth", "7b"), p / "b"),
    "embformer-none": lambda p: exact_bundle(embformer(p / "c"), p / "b", cache_dtype="none"),
    "lckv": lambda p: exact_bundle(lckv(p / "c"), p / "b"),
}


def rounded(path: Path, **options: Any) -> pleexport.Bundle:
    checkpoint = gemma4(path / "c", hidden_size=64, intermediate_size=96)
    return pleexport.build(checkpoint, path / "b", verify=False, **options)


ROUNDED_BUNDLES: dict[str, Callable[[Path], pleexport.Bundle]] = {
    "int4 weights, tied int8 head, int8 caches": lambda p: rounded(
        p, target="android", cache_dtype="int8"
    ),
    "int8 weights, int4 tables, fp16 caches": lambda p: rounded(
        p, weight_dtype="int8", table_dtype="int4", cache_dtype="fp16"
    ),
    "2 and 4 bits of a checkpoint for phones": lambda p: pleexport.build(
        mobile_gemma4(p / "c"), p / "b", weight_dtype="source", table_dtype="source", verify=False
    ),
}


@pytest.fixture(scope="session")
def cases(gemma4_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles, tokenizers and answers of the Python library, for the library's own tests."""
    folder = tmp_path_factory.mktemp("kotlin")
    for name in ("bundles", "tokenizers"):
        (folder / name).mkdir()
    shutil.copytree(gemma4_bundle, folder / "bundles" / "gemma4")
    for name, make in SHARED.items():
        (tmp_path_factory.getbasetemp() / name).mkdir()
        bundle = make(tmp_path_factory.getbasetemp() / name)
        shutil.copytree(bundle.path, folder / "bundles" / name)
    kotlin_cases.write_tokenizers(folder / "tokenizers")
    kotlin_cases.write_sampling(folder / "sampling.json")
    kotlin_cases.write_rules(folder / "rules.json")
    return folder


def test_its_own_tests_pass(jar: Path, cases: Path) -> None:
    maven("surefire:test", f"-Dpleexport.cases={cases}")
    reports = "".join(p.read_text() for p in (PROJECT / "target/surefire-reports").glob("*.txt"))
    assert reports.count("Skipped: 0") == reports.count("Tests run") >= 6, reports


@pytest.mark.parametrize("name", ["gemma4", *SHARED])
def test_logits_of_shared_bundles_are_those_of_python(name: str, jar: Path, cases: Path) -> None:
    check_logits(jar, cases / "bundles" / name, TOLERANCE)


def test_logits_of_gemma3n_are_those_of_python(jar: Path, gemma3n_bundle: Path) -> None:
    check_logits(jar, gemma3n_bundle, TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_logits_of_an_exact_bundle_are_those_of_python(
    name: str, jar: Path, tmp_path: Path
) -> None:
    check_logits(jar, EXACT[name](tmp_path).path, TOLERANCE)


@pytest.mark.parametrize("name", ROUNDED_BUNDLES)
def test_logits_of_a_rounded_bundle_are_near(name: str, jar: Path, tmp_path: Path) -> None:
    check_logits(jar, ROUNDED_BUNDLES[name](tmp_path).path, ROUNDED)


def test_text_is_that_of_python(jar: Path, tmp_path: Path) -> None:
    save(byte_fallback(), tmp_path / "tokenizer", bos_token="<bos>")
    checkpoint = gemma4(tmp_path / "c", vocab_size=290, vocab_size_per_layer_input=290)
    bundle = pleexport.build(
        checkpoint,
        tmp_path / "b",
        tokenizer=tmp_path / "tokenizer" / "tokenizer.json",
        table_dtype="source",
        weight_dtype="fp32",
        verify=False,
    ).path
    runner = pleexport.Runner(bundle, threads=1)
    expected = "".join(t.text for t in runner.generate("ab é", max_new_tokens=40, greedy=True))
    options = ("--max-new-tokens", 40, "--greedy")
    done = java(jar, "run", bundle, "--prompt", "ab é", *options)
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
    assert len(set(expected)) > 3
    stopped = java(jar, "run", bundle, "--prompt", "ab é", *options, "--stop", expected[3:5])
    assert stopped.stdout == expected[: expected.index(expected[3:5])] + "\n"
    timed = java(
        jar, "bench", bundle, "--prompt-tokens", "8", "--decode-tokens", 4, "--repeat", 1, "--json"
    )
    assert '"decode_tokens_per_second"' in timed.stdout


def test_no_cache_is_copied(jar: Path, cases: Path) -> None:
    """ONNX Runtime says so when it copies one."""
    folders = (PROJECT / "target" / name for name in ("test-classes", "classes", "lib/*"))
    command = ["java", "-cp", ":".join(map(str, folders)), "io.pleexport.CacheWarnings"]
    for name in ("gemma4", "lckv"):
        bundle = str(cases / "bundles" / name)
        said = subprocess.run([*command, bundle], capture_output=True, text=True, check=True)
        assert "in-place optimization not activated" not in said.stderr
    apart = subprocess.run([*command, bundle, "apart"], capture_output=True, text=True, check=True)
    assert "in-place optimization not activated" in apart.stderr


def refusal(jar: Path, bundle: Path, ids: list[int]) -> str:
    """The one sentence that is said of a bundle that cannot be used."""
    out = bundle.parent / "refused.npy"
    done = java(jar, "logits", bundle, "--ids", ",".join(map(str, ids)), "--out", out)
    assert done.returncode == 2, done.stdout + done.stderr
    sentence, empty, hint = done.stderr.strip().split("\n")
    assert (sentence[:7], empty, hint[:6]) == ("error: ", "", "hint: ")
    return sentence


def test_a_flipped_byte_in_any_file_is_told(jar: Path, tmp_path: Path) -> None:
    save(byte_fallback(), tmp_path / "tokenizer", bos_token="<bos>")
    whole = rounded(
        tmp_path, target="android", tokenizer=tmp_path / "tokenizer" / "tokenizer.json"
    ).path
    names = {path.name for path in whole.iterdir()}
    assert {"tied.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    rows = pleexport.Bundle(whole).open_blob()
    for name in sorted(names - {"parity.json"}):
        bundle = shutil.copytree(whole, tmp_path / "damaged", dirs_exist_ok=True)
        data = bytearray((bundle / name).read_bytes())
        # A row that is looked up; other rows of a blob are compared when they are.
        place = rows.rows_offset + 5 * rows.row_stride + 9 if "embed" in name else len(data) // 2
        data[place] ^= 1
        (bundle / name).write_bytes(data)
        sentence = refusal(jar, bundle, [2, 5])
        assert str(bundle / name) in sentence
        assert "damaged" in sentence


def test_a_bundle_that_is_none_is_refused(jar: Path, gemma4_bundle: Path, tmp_path: Path) -> None:
    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        bundle = shutil.copytree(gemma4_bundle, tmp_path / "b", dirs_exist_ok=True)
        change_manifest(bundle, change)
        return refusal(jar, bundle, [2])

    def executorch(manifest: dict[str, Any]) -> None:
        graph = manifest["graphs"]["decoder"]
        graph["backend"], graph["contract"]["id"] = "executorch", "pleexport.executorch/1"

    assert "has schema 9; this version reads 2" in changed(lambda m: m.update(schema=9))
    assert "unknown field `surprise`" in changed(lambda m: m.update(surprise=1))
    assert "points outside the bundle" in changed(lambda m: m["files"][0].update(name="../x"))
    assert "for the backend `executorch`" in changed(executorch)
    assert "blob of another bundle" in changed(lambda m: m.update(tables_digest="other"))
    other = changed(lambda m: m["graphs"]["decoder"]["contract"].update(vocab_size=7))
    assert "and the manifest disagree about logits" in other
    assert "is not a bundle" in refusal(jar, tmp_path / "nowhere", [2])

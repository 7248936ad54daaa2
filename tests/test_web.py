"""The npm package against the Python library: logits, texts, and what it refuses.

npm builds it once. Where there is no Node the tests are skipped, but not in CI.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from email.message import Message
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import kotlin_cases
import numpy as np
import pytest
from checkpoints import gemma4
from conftest import TOLERANCE, relative_error
from numpy.typing import NDArray
from refusals import damaged_copies, sentence_of
from resealed import change_manifest
from rwkv_checkpoints import rwkv
from unrounded import unrounded

import pleexport
from pleexport.runtime.conversation import Conversation

ROOT = Path(__file__).parents[1]
CONFORMANCE = ROOT / "conformance"
BUNDLES = sorted(path.stem for path in CONFORMANCE.glob("*.json"))
# A process for each takes seconds to start; its own tests have the vectors of all of them.
SOME = ("gemma4-int4", "gemma3n-int8", "rwkv7a-int8", "embformer-bf16")
PROJECT = ROOT / "web-demo" / "pleexport-web"
REQUIRED = bool(os.environ.get("CI") or os.environ.get("PLEEXPORT_REQUIRE_TOOLS"))
OLDEST_NODE = (20, 10)
CHROMIUM = Path("/usr/bin/chromium")


def node_is_there() -> bool:
    if not (shutil.which("node") and shutil.which("npm")):
        return False
    said = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, said.strip().lstrip("v").split(".")[:2])) >= OLDEST_NODE


def sources(project: Path) -> list[Path]:
    """What the package is built from, and nothing that building it writes."""
    written = [*project.glob("*.json"), project / "bundle.mjs"]
    for folder in ("src", "test"):
        written += [*(project / folder).glob("*.ts"), *(project / folder).glob("*.json")]
    return sorted(written)


@pytest.fixture(scope="session")
def program() -> Path:
    """The command line, built by npm where a source has changed."""
    if not node_is_there():
        why = "the npm package needs Node 20.10 or newer, with npm: https://nodejs.org"
        assert not REQUIRED, why
        pytest.skip(why)
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources(PROJECT))).hexdigest()
    build = PROJECT / "build"
    build.mkdir(exist_ok=True)
    with (build / "lock").open("w") as lock:  # other workers build too
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = build / "built"
        if not stamp.exists() or stamp.read_text() != state:
            npm("ci", "--ignore-scripts", "--no-audit", "--no-fund")
            npm("run", "build")
            npm("exec", "--", "tsc", "-p", "test/tsconfig.json")
            stamp.write_text(state)
    return PROJECT / "dist" / "main.js"


def npm(*arguments: str, folder: Path = PROJECT) -> str:
    done = subprocess.run(
        ["npm", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def web(program: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = ["node", program, *arguments, "--threads", "1"]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", check=False
    )


def test_building_changes_no_source(program: Path) -> None:
    """A worker that took what another has built for a change would build again below its tests."""
    folders = {path.relative_to(PROJECT).parts[0] for path in sources(PROJECT)}
    assert not folders & {"node_modules", "dist", "build"}


def test_its_own_tests_pass(program: Path, tmp_path: Path) -> None:
    """Among them are the conformance vectors."""
    (tmp_path / "tokenizers").mkdir()
    kotlin_cases.write_tokenizers(tmp_path / "tokenizers")
    kotlin_cases.write_sampling(tmp_path / "sampling.json")
    kotlin_cases.write_rules(tmp_path / "rules.json")
    tests = program.parents[1] / "build" / "test" / "test" / "all.js"
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", tests],
        env=os.environ | {"PLEEXPORT_CASES": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = [line for line in done.stdout.splitlines() if "not ok" in line or "error:" in line]
    assert done.returncode == 0, "\n".join(failed)
    counts = dict(re.findall(r"^# (\w+) (\d+)$", done.stdout, re.MULTILINE))
    assert int(counts["pass"]) > 150
    assert (counts["skipped"], counts["fail"]) == ("0", "0")


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: `apt-get install chromium`")
@pytest.mark.slow
def test_it_runs_in_a_browser(program: Path, tmp_path: Path) -> None:
    """Vectors, threads, starters, what is kept, a second tab, failing servers, in Chromium."""
    text, target = tmp_path / "text.txt", tmp_path / "page.toml"
    text.write_text("the rows that a text uses\n")
    shipped = (ROOT / "targets" / "web.toml").read_text()
    target.write_text(shipped.replace("starter_share = 0.019", "starter_share = 0.5"))
    packaged = PROJECT / "build" / "package"
    pleexport.package(
        CONFORMANCE / "gemma4-fp32", packaged, target=str(target), texts=[text], overwrite=True
    )
    described = {
        "PLEEXPORT_CHROMIUM": str(CHROMIUM),
        "PLEEXPORT_PACKAGE": packaged.relative_to(ROOT).as_posix(),
        "PLEEXPORT_TEXT": text.read_text(),
    }
    passed_in_browser(program, "browser.test.js", described)


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: `apt-get install chromium`")
@pytest.mark.slow
def test_the_page_works_in_a_browser(program: Path) -> None:
    """Conversations, keyboard, accessibility, loading, no network, errors, tabs, a new version."""
    npm("exec", "--", "tsc", "-p", "../page/tsconfig.json")
    passed_in_browser(program, "page.test.js", {"PLEEXPORT_CHROMIUM": str(CHROMIUM)})


def passed_in_browser(
    program: Path, name: str, described: dict[str, str], *, timeout: float = 900
) -> dict[str, str]:
    """Run a file of tests, all of which have to pass; how many passed and were skipped."""
    tests = program.parents[1] / "build" / "test" / "test" / name
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", tests],
        env=os.environ | described,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    failed = [line for line in done.stdout.splitlines() if "not ok" in line or "error:" in line]
    assert done.returncode == 0, "\n".join(failed)
    counts = dict(re.findall(r"^# (\w+) (\d+)$", done.stdout, re.MULTILINE))
    assert counts["fail"] == "0"
    return counts


@pytest.fixture
def demo_server(program: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server of `make web-demo` on the conformance bundles, and its address."""
    command = ["node", str(ROOT / "web-demo" / "serve.mjs"), str(CONFORMANCE), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = re.search(r"http://localhost:\d+", server.stdout.readline())
        assert url is not None
        yield server, url[0]
        server.kill()


def test_the_demo_server_answers_as_a_page_needs_it(
    program: Path, demo_server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    server, url = demo_server
    name = "gemma4-fp32/embeddings.safetensors"
    data = (CONFORMANCE / name).read_bytes()

    def ask(place: str, **headers: str) -> tuple[int, bytes, Message]:
        request = Request(f"{url}/{place}", headers=headers)
        try:
            with urlopen(request) as answer:
                return answer.status, answer.read(), answer.headers
        except HTTPError as err:
            return err.code, b"", err.headers

    status, body, headers = ask(name)
    assert (status, body) == (200, data)
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    tag = headers["etag"]
    assert ask(name, **{"if-none-match": tag})[0] == 304
    status, body, headers = ask(name, range="bytes=10-19")
    assert (status, body) == (206, data[10:20])
    assert headers["content-range"] == f"bytes 10-19/{len(data)}"
    assert ask(name, range="bytes=-5")[1] == data[-5:]
    status, body, headers = ask(name, range="bytes=0-3,100-103")
    assert "multipart/byteranges" in headers["content-type"]
    assert data[:4] in body
    assert data[100:104] in body
    assert ask("../pyproject.toml")[0] == ask("%2e%2e/pyproject.toml")[0] == 404
    assert ask("gemma4-fp32")[0] == 404
    found = logits(program, f"{url}/gemma4-fp32", [1, 250, 3], tmp_path / "logits.npy")
    expected = pleexport.Runner(CONFORMANCE / "gemma4-fp32", threads=1).logits([1, 250, 3])
    assert relative_error(expected, found) < TOLERANCE
    server.send_signal(signal.SIGINT)
    assert server.stdout is not None
    assert server.stdout.read() == "\nStopped.\n"
    assert server.wait(10) == 0


def test_a_graph_for_a_gpu_runs_without_one(
    program: Path, gpu_bundle: Path, tmp_path: Path
) -> None:
    runner = pleexport.Runner(gpu_bundle, threads=1)
    ids = np.random.default_rng(3).integers(0, runner.blob.num_rows, 150).tolist()
    found = logits(program, gpu_bundle, ids, tmp_path / "logits.npy")
    assert relative_error(runner.logits(ids), found) < TOLERANCE
    # The control: one id is another.
    ids[50] = (ids[50] + 1) % runner.blob.num_rows
    assert relative_error(runner.logits(ids), found) > TOLERANCE


# Past 512 positions caches grow; a recurrence takes a call for each token.
ON_WEBGPU = {"gemma4": 530, "gemma3n": 70, "rwkv7a": 45}


@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium: `apt-get install chromium`")
@pytest.mark.slow
def test_graphs_for_a_gpu_run_on_webgpu(
    program: Path, gemma4_checkpoint: Path, gemma3n_checkpoint: Path, tmp_path: Path
) -> None:
    """In int4, against Python; SwiftShader stands in for a GPU."""
    recurrent = rwkv(tmp_path / "model.pth", "7a")
    checkpoints = {"gemma4": gemma4_checkpoint, "gemma3n": gemma3n_checkpoint, "rwkv7a": recurrent}
    folder = PROJECT / "build" / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    for name, count in ON_WEBGPU.items():
        bundle = pleexport.build(checkpoints[name], folder / name, target="web-gpu", verify=False)
        runner = pleexport.Runner(bundle, threads=1)
        ids = np.random.default_rng(4).integers(0, runner.blob.num_rows, count).tolist()
        expected = runner.logits(ids).astype("<f4")
        options: dict[str, Any] = {"max_new_tokens": 12, "greedy": True, "ignore_eos": True}
        vectors = {
            "ids": ids,
            "logits": base64.b64encode(expected.tobytes()).decode(),
            "prompt": ids[:9],
            "greedy": [token.id for token in runner.generate(ids[:9], **options)],
        }
        (folder / f"{name}.json").write_text(json.dumps(vectors))
    # The page needs a tokenizer, whose ids all have rows.
    rows = gemma4(tmp_path / "gemma4", vocab_size=512, vocab_size_per_layer_input=512)
    texts: dict[str, Any] = {"tokenizer": CONFORMANCE / "gemma4-fp32", "verify": False}
    pleexport.build(rows, folder / "page", target="web-gpu", **texts)
    npm("exec", "--", "tsc", "-p", "../page/tsconfig.json")
    described = {
        "PLEEXPORT_CHROMIUM": str(CHROMIUM),
        "PLEEXPORT_GPU": str(folder.relative_to(ROOT)),
    }
    counts = passed_in_browser(program, "webgpu.test.js", described, timeout=1800)
    assert (counts["pass"], counts["skipped"]) == ("5", "0")


def logits(program: Path, bundle: Path | str, ids: list[int], out: Path) -> NDArray[np.float32]:
    done = web(program, "logits", bundle, "--ids", ",".join(map(str, ids)), "--out", out)
    assert done.returncode == 0, done.stderr
    found: NDArray[np.float32] = np.load(out)
    assert found.dtype == np.float32
    return found


@pytest.mark.parametrize(
    "name",
    [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in BUNDLES],
)
def test_logits_are_those_of_python(name: str, program: Path, tmp_path: Path) -> None:
    bundle = CONFORMANCE / name
    # WebAssembly does not round the inputs of matrices to codes.
    expecting = unrounded(bundle, tmp_path / "copy") or bundle
    runner = pleexport.Runner(expecting, threads=1)
    ids = np.random.default_rng(3).integers(0, runner.blob.num_rows, 300).tolist()
    expected = runner.logits(ids)
    found = logits(program, bundle, ids, tmp_path / "logits.npy")
    assert relative_error(expected, found) < TOLERANCE
    # The control: one id is another.
    ids[150] = (ids[150] + 1) % runner.blob.num_rows
    assert relative_error(expected, runner.logits(ids)) > TOLERANCE


def test_text_is_that_of_python(program: Path) -> None:
    bundle = CONFORMANCE / "gemma4-fp32"
    runner = pleexport.Runner(bundle, threads=1)
    expected = "".join(t.text for t in runner.generate("ab é", max_new_tokens=40, greedy=True))
    options = ("--max-new-tokens", 40, "--greedy")
    done = web(program, "run", bundle, "--prompt", "ab é", "--no-chat", *options)
    assert (done.returncode, done.stdout) == (0, expected + "\n"), done.stderr
    assert len(set(expected)) > 3
    end = expected[3:5]
    done = web(program, "run", bundle, "--prompt", "ab é", "--no-chat", *options, "--stop", end)
    assert done.stdout == expected[: expected.index(end)] + "\n"
    conversation = Conversation(runner, max_new_tokens=40, greedy=True)
    done = web(program, "run", bundle, "--prompt", "ab", *options, "--stats")
    assert done.stdout == "".join(conversation.ask("ab")) + "\n"
    assert "decode: " in done.stderr
    assert runner.tokenizer is not None
    ids = runner.tokenizer.encode("ab é")
    assert web(program, "encode", bundle, "--text", "ab é").stdout.strip() == ",".join(
        map(str, ids)
    )
    done = web(program, "decode", bundle, "--ids", ",".join(map(str, ids)))
    assert done.stdout.rstrip("\n") == runner.tokenizer.decode(ids)


def test_a_bundle_is_timed_and_verified(program: Path) -> None:
    bundle = CONFORMANCE / "lckv-fp16"
    options = ("--prompt-tokens", 8, "--decode-tokens", 4, "--repeat", 1, "--json")
    timed = web(program, "bench", bundle, *options)
    assert json.loads(timed.stdout)["timings"][0]["decode_tokens_per_second"] > 0
    verified = web(program, "verify", bundle)
    assert (verified.returncode, verified.stdout) == (0, "Files are intact.\n"), verified.stderr


def refusal(program: Path, bundle: Path | str, ids: list[int], out: Path) -> str:
    """The one sentence that is said of a bundle that cannot be used."""
    done = web(program, "logits", bundle, "--ids", ",".join(map(str, ids)), "--out", out)
    assert not out.exists()
    return sentence_of(done)


def test_a_flipped_byte_in_any_file_is_told(program: Path, tmp_path: Path) -> None:
    whole = CONFORMANCE / "gemma4-int4"
    for name, bundle in damaged_copies(whole, tmp_path / "damaged"):
        sentence = refusal(program, bundle, [2, 5], tmp_path / "refused.npy")
        assert f"{name}`" in sentence
        assert "damaged" in sentence


def test_a_bundle_that_is_none_is_refused(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "refused.npy"

    def changed(change: Callable[[dict[str, Any]], Any]) -> str:
        bundle = shutil.copytree(CONFORMANCE / "gemma4-fp32", tmp_path / "b", dirs_exist_ok=True)
        change_manifest(bundle, change)
        return refusal(program, bundle, [2], out)

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
    assert "is not a bundle" in refusal(program, tmp_path / "nowhere", [2], out)
    assert "token id 999999 has no row" in refusal(
        program, CONFORMANCE / "rwkv8-fp32", [999999], out
    )


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server, which does not know ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_server_that_sends_whole_files_is_told(program: Path, tmp_path: Path) -> None:
    handler = partial(Quiet, directory=CONFORMANCE)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/gemma4-fp32"
        sentence = refusal(program, url, [2], tmp_path / "refused.npy")
        server.shutdown()
    assert "with the whole file, 200 in place of 206" in sentence


CONSUMER = """
import { HttpFiles, Runner, type Token } from "pleexport-web";
import { openBundle } from "pleexport-web/node";
export async function answer(text: string): Promise<readonly Token[]> {
  const runner: Runner = await Runner.open(await openBundle("bundle"), { threads: 1 });
  const tokens: Token[] = [];
  for await (const token of runner.generate(text, { topK: 5 })) tokens.push(token);
  // @ts-expect-error
  runner.generate(text, { topK: "five" });
  return tokens;
}
export const files = HttpFiles;
"""


def test_the_package_holds_what_a_user_needs(program: Path, tmp_path: Path) -> None:
    npm("pack", "--ignore-scripts", "--pack-destination", str(tmp_path))
    (packed,) = tmp_path.glob("*.tgz")
    # Nearly all of it is what a page loads of the runtime: of WebAssembly, or of WebGPU.
    assert packed.stat().st_size < 12_000_000
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    package = tmp_path / "package"
    described = json.loads((package / "package.json").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert described["version"] == project["version"]
    names = {path.name for path in (package / "dist").iterdir()} - {"browser"}
    runtime = {"ort-module.js", "ort-wasm-simd-threaded.wasm"}
    webgpu = {"ort-gpu.js", *(f"ort-wasm-simd-threaded.asyncify.{end}" for end in ("js", "wasm"))}
    loaded = {path.name for path in (package / "dist" / "browser").iterdir()}
    assert loaded == {"client.js", "worker.js", "chunk.js"} | runtime | webgpu
    sources = {path.stem for path in (PROJECT / "src").glob("*.ts") if ".d" not in path.name}
    assert names == {f"{name}{ending}" for name in sources for ending in (".js", ".d.ts")}
    beside = {path.name for path in package.iterdir()}
    assert beside == {"dist", "package.json", "README.md", "LICENSE"}
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    # It works where it is installed, and its types are whole.
    modules = tmp_path / "user" / "node_modules"
    modules.mkdir(parents=True)
    for path in (PROJECT / "node_modules").iterdir():
        (modules / path.name).symlink_to(path)
    package.rename(modules / "pleexport-web")
    (tmp_path / "user" / "use.ts").write_text(CONSUMER)
    options = ["--noEmit", "--strict", "--module", "nodenext", "--types", "node"]
    tsc = [PROJECT / "node_modules" / ".bin" / "tsc", *options, "use.ts"]
    done = subprocess.run(tsc, cwd=tmp_path / "user", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    main = modules / "pleexport-web" / "dist" / "main.js"
    ids = [1, 2, 3]
    found = logits(main, CONFORMANCE / "rwkv8-fp32", ids, tmp_path / "logits.npy")
    expected = pleexport.Runner(CONFORMANCE / "rwkv8-fp32", threads=1).logits(ids)
    assert relative_error(expected, found) < TOLERANCE


def test_versions_are_exact_and_locked() -> None:
    described = json.loads((PROJECT / "package.json").read_text())
    locked = json.loads((PROJECT / "package-lock.json").read_text())["packages"]
    named = described["dependencies"] | described["devDependencies"]
    assert len(described["dependencies"]) == 4
    for name, version in named.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert all(entry.get("integrity") for name, entry in locked.items() if name)

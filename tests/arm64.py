"""Run the conformance vectors on emulated 64-bit ARM processors: `make arm64`.

The Python runner, the Kotlin library and the C reader run under qemu, which knows the instructions
of each processor of `CPUS` and no others. All that takes is fetched into build/arm64 once: packages
of Debian are unpacked there, nothing is installed, and no rights are needed. It needs apt, Maven
and a JDK. Times say nothing about a real processor.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

HERE = Path(__file__).parents[1]
BUILD = HERE / "build" / "arm64"

# What is run, all in one place. Debian's archive has one version of a package at a time, so there a
# suite is named; versions.txt in the build folder has what came. Packages of Python have the
# versions and digests of requirements.lock, the Kotlin library has the versions of its pom.xml.
CPUS = ("cortex-a72", "cortex-a76")  # of the Raspberry Pi 4 and 5
SUITE = "bookworm"
# qemu 7.2 of bookworm itself crashes while ONNX Runtime is loaded.
QEMU_SUITE, OLDEST_QEMU = "bookworm-backports", 10
ARM_PACKAGES = (
    *("python3.11-minimal", "libpython3.11-stdlib", "libstdc++6"),
    *("openjdk-17-jre-headless", "libc6-dev"),
)
WHEELS = (
    *("annotated-doc", "annotated-types", "flatbuffers", "iniconfig", "jinja2", "markdown-it-py"),
    *("markupsafe", "mdurl", "ml-dtypes", "msgspec", "numpy", "onnxruntime", "packaging"),
    *("pluggy", "protobuf", "psutil", "pydantic", "pydantic-core", "pygments", "pytest", "rich"),
    *("shellingham", "tokenizers", "tqdm", "typer", "typing-extensions", "typing-inspection"),
    "xxhash",
)
WHEEL_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
# Beside the locked one, the oldest that targets of boards name.
OLDER_ONNXRUNTIME = "1.29.0"

DEBIAN = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# The bundle of which the controls change a logit.
CHANGED = "gemma4-fp32"


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"error: {sentence}")


def run(command: Iterable[object], what: str, **options: object) -> str:
    """What a command prints; where it fails, say what could not be done."""
    words = [str(word) for word in command]
    environment = {**os.environ, **{k: str(v) for k, v in options.items()}}
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    except OSError as err:
        stop(f"{what} needs `{words[0]}` ({err.strerror})")
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        stop(f"{what} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


# Fetching.


def once(folder: Path, pins: object, make: Callable[[], object]) -> None:
    """Make a folder, or keep the one that was made of the same."""
    stamp = folder.with_suffix(".made-of")
    if stamp.exists() and stamp.read_text() == repr(pins):
        return
    print(f"fetching {folder.relative_to(HERE)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make()
    stamp.write_text(repr(pins))


def debian(folder: Path, architecture: str, packages: dict[str, tuple[str, ...]]) -> None:
    """Unpack packages of suites, and all that they depend on, into a folder."""
    apt = BUILD / f"apt-{architecture}"
    for name in ("lists/partial", "archives/partial", "parts"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(
        "".join(f"deb [signed-by={KEYRING}] {DEBIAN} {suite} main\n" for suite in packages)
    )
    (apt / "apt.conf").write_text(
        f'Dir::State "{apt}"; Dir::State::Lists "lists"; Dir::State::Status "{apt}/status";\n'
        f'Dir::Cache "{apt}"; Dir::Cache::Archives "archives"; Dir::Etc "{apt}/parts";\n'
        f'Dir::Etc::SourceList "{apt}/sources.list"; Dir::Etc::SourceParts "{apt}/parts";\n'
        f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};\n'
        'APT::Install-Recommends "false"; APT::Sandbox::User "";\n'
    )
    conf = {"APT_CONFIG": apt / "apt.conf"}
    run(["apt-get", "update", "-qq"], f"reading the packages of Debian for {architecture}", **conf)
    for suite, names in packages.items():
        command = ["apt-get", "install", "--download-only", "-y", "-qq", "-t", suite, *names]
        run(command, f"fetching {', '.join(names)} of Debian {suite}", **conf)
    for package in sorted((apt / "archives").glob("*.deb")):
        run(["dpkg-deb", "-x", package, folder], f"unpacking {package.name}")
    # Links to places of the system they were made for: qemu does not see to those.
    for path in folder.rglob("*"):
        if path.is_symlink() and os.readlink(path).startswith("/"):
            target = folder / os.readlink(path).lstrip("/")
            path.unlink()
            path.symlink_to(os.path.relpath(target, path.parent))


def locked(names: Iterable[str]) -> str:
    """The entries of requirements.lock for some packages, each with its digests."""
    lock = (HERE / "requirements.lock").read_text()
    # Where a package has two entries, the first is the one for Python 3.11.
    found = {n: re.search(rf"^{re.escape(n)}==(?:.*\\\n)*.*\n", lock, re.MULTILINE) for n in names}
    missing = [name for name, entry in found.items() if entry is None]
    if missing:
        stop(f"requirements.lock lacks {', '.join(missing)}")
    return "".join(entry.group() for entry in found.values() if entry)


def wheels(folder: Path, *requirements: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
    command += [word for name in WHEEL_PLATFORMS for word in ("--platform", name)]
    command += ["--python-version", "3.11", "--implementation", "cp", "--only-binary", ":all:"]
    run([*command, *requirements], "fetching packages of Python for aarch64")


def fetch_all() -> None:
    arm, host = (
        {SUITE: ARM_PACKAGES},
        {SUITE: ("gcc-aarch64-linux-gnu",), QEMU_SUITE: ("qemu-user",)},
    )
    architecture = run(["dpkg", "--print-architecture"], "`make arm64`").strip()
    once(BUILD / "root", arm, lambda: debian(BUILD / "root", "arm64", arm))
    once(BUILD / "host", host, lambda: debian(BUILD / "host", architecture, host))
    (BUILD / "wheels.txt").write_text(locked(WHEELS))
    hashed = ("--require-hashes", "-r", str(BUILD / "wheels.txt"))
    once(BUILD / "wheels", locked(WHEELS), lambda: wheels(BUILD / "wheels", *hashed))
    older = BUILD / f"onnxruntime-{OLDER_ONNXRUNTIME}"
    once(older, OLDER_ONNXRUNTIME, lambda: wheels(older, f"onnxruntime=={OLDER_ONNXRUNTIME}"))
    qemu = run([BUILD / "host/usr/bin/qemu-aarch64", "--version"], "qemu").split("\n")[0]
    major = re.search(r"version (\d+)\.", qemu)
    if not major or int(major[1]) < OLDEST_QEMU:
        stop(f"{qemu} is too old; {OLDEST_QEMU} or newer is needed")
    names = sorted(path.name for path in BUILD.glob("apt-*/archives/*.deb"))
    (BUILD / "versions.txt").write_text("\n".join(names) + "\n")
    print(qemu)


# Running.


def launcher(cpu: str, name: str, program: Path, **environment: object) -> Path:
    """A script that runs an arm64 program as if it were one of this machine."""
    script = BUILD / cpu / "bin" / name
    script.parent.mkdir(parents=True, exist_ok=True)
    settings = [w for k, v in environment.items() for w in ("-E", f"{k}={v}")]
    qemu = [BUILD / "host/usr/bin/qemu-aarch64", "-cpu", cpu, "-L", BUILD / "root"]
    command = shlex.join(map(str, [*qemu, "-0", script, *settings, program]))
    # Surefire starts a JVM in its project's folder; a control has a folder of its own.
    script.write_text(f'#!/bin/sh\ncd "${{ARM64_FOLDER:-.}}" && exec {command} "$@"\n')
    script.chmod(0o755)
    return script


def python(cpu: str, older: str | None = None) -> Path:
    paths = [HERE, BUILD / "wheels"]
    if older:
        paths.insert(0, BUILD / f"onnxruntime-{older}")
    return launcher(
        cpu,
        f"python-{older or 'locked'}",
        BUILD / "root/usr/bin/python3.11",
        PYTHONHOME=BUILD / "root/usr",
        PYTHONPATH=":".join(map(str, paths)),
        PYTHONDONTWRITEBYTECODE=1,
    )


def c_reader(cpu: str) -> Path:
    out, host = BUILD / "blob", BUILD / "host/usr"
    libraries = ":".join(str(path) for path in (host / "lib").glob("*-linux-gnu"))
    command = [host / "bin/aarch64-linux-gnu-gcc", f"--sysroot={BUILD / 'root'}", "-std=c11", "-O2"]
    command += ["-Wall", "-Wextra", "-Werror", "-o", out, HERE / "docs/examples/blob.c"]
    run(command, "compiling the C reader", LD_LIBRARY_PATH=libraries)
    return launcher(cpu, "blob", out)


def java(cpu: str) -> Path:
    (home,) = (BUILD / "root/usr/lib/jvm").glob("java-17-openjdk-arm64")
    return launcher(cpu, "java", home / "bin/java")


def passes(command: Iterable[object], folder: Path = HERE, **environment: object) -> str | None:
    """What a run of tests ends with where it passes; None where it fails, after what it says."""
    settings = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=settings, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode:
        print(said, file=sys.stderr)
        return None
    return (said.strip().splitlines() or [""])[-1]


def pytest(python: Path | str, test: Path, select: str) -> list[object]:
    options = ["-q", "--tb=short", "-p", "no:cacheprovider"]
    return [python, "-m", "pytest", *options, "-k", select, test]


def surefire(cpu: str, test: str) -> list[object]:
    return ["mvn", "-q", "-B", "surefire:test", f"-Djvm={java(cpu)}", f"-Dtest={test}"]


def changed_logit(cpu: str) -> Path:
    """A copy of what a test of the vectors reads, with another number for one logit."""
    copy = BUILD / cpu / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "tests").mkdir(parents=True)
    (copy / "android-demo/runtime").mkdir(parents=True)
    shutil.copy(HERE / "tests/test_conformance.py", copy / "tests")
    shutil.copytree(HERE / "conformance" / CHANGED, copy / "conformance" / CHANGED)
    asked = json.loads((HERE / "conformance" / f"{CHANGED}.json").read_text())
    (case,) = asked["logits"]
    logits = np.frombuffer(base64.b64decode(case["logits"]), "<f4").copy()
    logits[-1] += 3 * case["tolerance"]
    case["logits"] = base64.b64encode(logits.tobytes()).decode()
    (copy / "conformance" / f"{CHANGED}.json").write_text(json.dumps(asked))
    return copy


def fails(command: Iterable[object], because: str, folder: Path, **environment: object) -> bool:
    """Whether a control fails, and for its own reason."""
    settings = {**os.environ, **{k: str(v) for k, v in environment.items()}}
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=folder, env=settings, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode and because in said:
        return True
    print(said, file=sys.stderr)
    return False


def check_python(cpu: str) -> Iterable[tuple[str, object]]:
    test = HERE / "tests/test_conformance.py"
    # What is left out needs packages that build bundles.
    every = pytest(python(cpu), test, "not made_again and not such_a_graph")
    yield "Python, all vectors", passes([*every, "--noconftest"])
    # Texts and malformed files do not depend on ONNX Runtime.
    older = pytest(python(cpu, OLDER_ONNXRUNTIME), test, "answers_the_vectors")
    name = f"Python with onnxruntime {OLDER_ONNXRUNTIME}, answers"
    yield name, passes([*older, "--noconftest"])
    copy = changed_logit(cpu)
    control = pytest(python(cpu), copy / "tests/test_conformance.py", "answers_the_vectors")
    found = fails([*control, "--noconftest"], "logits are off", copy)
    yield "Python, a changed logit is found", found


def check_kotlin(cpu: str) -> Iterable[tuple[str, object]]:
    project = HERE / "android-demo/runtime"
    run(["mvn", "-q", "-B", "-f", project, "package", "-DskipTests"], "building the library")
    passed = passes(surefire(cpu, "ConformanceTest"), project)
    report = project / "target/surefire-reports/io.pleexport.ConformanceTest.txt"
    counted = re.search(r"Tests run: .*", report.read_text()) if passed is not None else None
    yield "Kotlin, all vectors", counted and "Skipped: 0" in counted[0] and counted[0]
    control = surefire(cpu, "ConformanceTest#logits*")
    folder = changed_logit(cpu) / "android-demo/runtime"
    found = fails(control, "times the tolerance, more than 1", project, ARM64_FOLDER=folder)
    yield "Kotlin, a changed logit is found", found


def check_c(cpu: str) -> Iterable[tuple[str, object]]:
    command = pytest(sys.executable, HERE / "tests/test_c_reader.py", "not each_rule")
    yield "C, with its controls", passes(command, PLEEXPORT_C_READER=c_reader(cpu))


CHECKS = {"c": check_c, "python": check_python, "kotlin": check_kotlin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="append", choices=CPUS, help="all by default")
    parser.add_argument("--only", action="append", choices=CHECKS, help="all by default")
    asked, failed = parser.parse_args(), 0
    fetch_all()
    for cpu in asked.cpu or CPUS:
        for name in asked.only or CHECKS:
            begin = time.monotonic()
            for what, result in CHECKS[name](cpu):
                seconds, failed = time.monotonic() - begin, failed + (not result)
                said = f": {result}" if isinstance(result, str) else ""
                verdict = "passed" if result else "FAILED"
                print(f"{cpu}: {what}: {verdict} after {seconds:.0f} s{said}", flush=True)
                begin = time.monotonic()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

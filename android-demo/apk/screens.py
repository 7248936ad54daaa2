"""Tests the app's screens on Android's own classes, without a phone: `make screens`.

    python android-demo/apk/screens.py

Robolectric runs the app, draws it and presses it on the JVM, and the bundle of the Gemma 4 sample
answers. What was seen lies in `build/apk/screens` as PNG. See downloads.py for what is fetched.
"""

from __future__ import annotations

import shutil
import sys
import zipfile

import make_apk
from downloads import ANDROID_15, ANDROID_26, CACHE, MONITOR, ApkError, fetched, tool

FOLDER = make_apk.OUT / "robolectric"
PICTURES = make_apk.OUT / "screens"


def main() -> int:
    """Runs the tests; 2 where something is missing or one fails."""
    try:
        run()
    except ApkError as err:
        print(f"error: {err}\n\nhint: {err.hint}", file=sys.stderr)
        return 2
    pictures = len(list(PICTURES.glob("*.png")))
    print(f"{pictures} pictures in {PICTURES.relative_to(make_apk.ROOT)}")
    return 0


def run() -> None:
    """Compiles library and app, and tests the screens.

    Raises:
        ApkError: something is missing, or a test failed.
    """
    make_apk.OUT.mkdir(parents=True, exist_ok=True)
    bundle = make_apk.sample()
    for folder in (FOLDER, PICTURES):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    resources = FOLDER / "app.apk"
    shutil.copyfile(make_apk.link_resources()[0], resources)
    with zipfile.ZipFile(resources, "a") as archive:
        make_apk.add_bundle(archive, bundle)
    with zipfile.ZipFile(fetched(MONITOR)) as archive:
        (FOLDER / "monitor.jar").write_bytes(archive.read("classes.jar"))
    configuration = FOLDER / "com/android/tools/test_config.properties"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(
        f"android_merged_manifest={make_apk.OUT / 'AndroidManifest.xml'}\n"
        f"android_resource_apk={resources}\n"
        f"android_custom_package={make_apk.setting('applicationId')}\n",
        encoding="utf-8",
    )
    fetched(ANDROID_26)
    make_apk.say("compiling, and looking at the screens")
    command = [tool("mvn", "maven"), "-q", "-B", "-f", str(make_apk.DEMO), "package"]
    command += ["-Pandroid,screens", "-Dtest=io.pleexport.app.*Test"]
    command += ["-Dsurefire.failIfNoSpecifiedTests=false", f"-Dscreens.folder={FOLDER}"]
    command += [f"-Dscreens.classes={fetched(ANDROID_15)}"]
    command += [f"-Dscreens.android={CACHE}", f"-Dscreens.pictures={PICTURES}"]
    make_apk.run([*command, f"-Dscreens.bundle={bundle}"], "a test of the screens fails")


if __name__ == "__main__":
    sys.exit(main())

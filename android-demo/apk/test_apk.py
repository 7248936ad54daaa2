"""The APK taken apart, and its shrunk classes run: `make apk`.

Nothing here runs on Android. Each check has a control, an APK or class that must fail it.
"""

from __future__ import annotations

import re
import struct
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import make_apk as build
import pytest
from dex import Class, Dex, read_dex
from downloads import API_26, JUNIT, R8, SNIFFER, fetched, tool

# What is newer than the oldest Android, and is asked for where it is only: each with its reason.
NEWER = {
    "android/graphics/Insets.bottom#I": "keepClear asks for Android 11",
    "android/graphics/Insets.left#I": "the same",
    "android/graphics/Insets.right#I": "the same",
    "android/graphics/Insets.top#I": "the same",
    "android/view/WindowInsets.getInsets": "the same",
    "android/view/WindowInsets$Type.displayCutout": "the same",
    "android/view/WindowInsets$Type.ime": "the same",
    "android/view/WindowInsets$Type.systemBars": "the same",
    "android/widget/TextView.setAccessibilityHeading": "heading asks for Android 9",
    "java/lang/ClassValue.<init>": "coroutines take a weak map where it is missing",
    "java/lang/ClassValue.get": "the same",
}
# R8 looks at a control of this, which does all that an app must not.
CONTROL = """
package ai.onnxruntime.telemetry;

public class HttpClient {
    public static Runnable lambda() {
        return () -> System.out.println(ProcessHandle.current().pid());
    }
}
"""
# Downloads, which go on behind a notification while nobody looks.
PERMISSIONS = (
    "INTERNET",
    "FOREGROUND_SERVICE",
    "FOREGROUND_SERVICE_DATA_SYNC",
    "POST_NOTIFICATIONS",
    "WAKE_LOCK",
)
SERVICES = [".DownloadService"]
MOST_APK_BYTES = 45_000_000
MOST_DEX_BYTES = 1_000_000


@pytest.fixture(scope="session")
def apk() -> Path:
    assert build.APK.exists(), "build it first: `make apk`"
    return build.APK


@pytest.fixture(scope="session")
def dex(apk: Path, tmp_path_factory: pytest.TempPathFactory) -> Dex:
    with zipfile.ZipFile(apk) as archive:
        assert [n for n in archive.namelist() if n.endswith(".dex")] == ["classes.dex"]
        path = Path(archive.extract("classes.dex", tmp_path_factory.mktemp("dex")))
    assert path.stat().st_size < MOST_DEX_BYTES
    return read_dex(path)


@pytest.fixture(scope="session")
def control_dex(tmp_path_factory: pytest.TempPathFactory) -> Dex:
    """Code with a lambda, a method that no Android has, and a class of the telemetry."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "HttpClient.java").write_text(CONTROL, encoding="utf-8")
    command = [tool("javac", "openjdk-17-jdk-headless"), "-d", str(folder)]
    build.run([*command, str(folder / "HttpClient.java")], "the control does not compile")
    java = tool("java", "openjdk-17-jdk-headless")
    command = [java, "-cp", str(fetched(R8)), "com.android.tools.r8.D8", "--min-api", "26"]
    command += ["--no-desugaring", "--lib", str(build.jdk(java)), "--output", str(folder)]
    classes = folder.rglob("*.class")
    build.run([*command, *map(str, classes)], "the control cannot be dexed")
    return read_dex(folder / "classes.dex")


@pytest.fixture(scope="session")
def api_26() -> dict[str, Class]:
    """All classes of Android 8.0 with their members."""
    command = [tool("java", "openjdk-17-jdk-headless"), "-cp", str(fetched(SNIFFER))]
    command += [str(Path(__file__).with_name("Signatures.java")), str(fetched(API_26))]
    classes: dict[str, Class] = {}
    members: set[str] = set()
    for line in build.run(command, "the list cannot be read").splitlines():
        if line.startswith("\t"):
            members.add(line[1:])
        else:
            name, *parents = line.split()
            classes[name] = Class(parents)
            members = classes[name].members
    assert len(classes) > 3000
    return classes


# Files


def offsets(apk: Path) -> Iterator[tuple[str, int]]:
    """Stored files, and where their content begins."""
    with zipfile.ZipFile(apk) as archive, apk.open("rb") as file:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)
                name, extra = struct.unpack("<HH", file.read(4))
                yield info.filename, info.header_offset + 30 + name + extra


def misaligned(apk: Path) -> list[str]:
    return [name for name, offset in offsets(apk) if offset % build.PAGE]


def test_every_stored_file_begins_at_a_page(apk: Path, tmp_path: Path) -> None:
    stored = {name for name, _ in offsets(apk)}
    assert {f"lib/{build.ABI}/libonnxruntime.so", "resources.arsc"} <= stored
    assert f"assets/bundles/{build.SAMPLE}/embeddings.safetensors" in stored
    assert misaligned(apk) == []
    control = tmp_path / "control.apk"
    with zipfile.ZipFile(apk) as archive, zipfile.ZipFile(control, "w") as plain:
        for info in archive.infolist()[:6]:
            plain.writestr(info.filename, archive.read(info))
    assert "resources.arsc" in misaligned(control)


def load_alignments(elf: bytes) -> list[int]:
    """Alignment of every LOAD segment of a 64-bit library."""
    assert elf[:5] == b"\x7fELF\x02"
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    headers = [elf[table + i * size : table + (i + 1) * size] for i in range(count)]
    return [
        struct.unpack_from("<Q", header, 48)[0]
        for header in headers
        if struct.unpack_from("<I", header)[0] == 1
    ]


def test_every_segment_of_a_library_is_aligned_to_a_page(apk: Path) -> None:
    with zipfile.ZipFile(apk) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        assert [Path(name).parent.as_posix() for name in libraries] == [f"lib/{build.ABI}"] * 2
        for name in libraries:
            elf = archive.read(name)
            assert load_alignments(elf)
            assert all(align % build.PAGE == 0 for align in load_alignments(elf)), name
    # The control: a header says pages of 4 KiB.
    control = bytearray(elf)
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    for i in range(count):
        struct.pack_into("<Q", control, table + i * size + 48, 4096)
    assert set(load_alignments(bytes(control))) == {4096}


def test_the_bundle_inside_is_whole(apk: Path) -> None:
    folder = build.sample()
    with zipfile.ZipFile(apk) as archive:
        inside = {Path(n).name: n for n in archive.namelist() if n.startswith("assets/bundles/")}
        assert sorted(inside) == sorted(path.name for path in folder.iterdir())
        for path in folder.iterdir():
            assert archive.read(inside[path.name]) == path.read_bytes()


def test_sizes_are_those_of_the_guide(apk: Path) -> None:
    assert apk.stat().st_size < MOST_APK_BYTES
    with zipfile.ZipFile(apk) as archive:
        natives = sum(i.file_size for i in archive.infolist() if i.filename.endswith(".so"))
        print(f"APK {apk.stat().st_size:,} bytes; native libraries {natives:,};", end=" ")
        print(f"dex {archive.getinfo('classes.dex').file_size:,}")
    assert natives > 0.8 * apk.stat().st_size  # nothing else weighs


def verifies(apk: Path) -> bool:
    command = [tool("apksigner", "apksigner"), "verify", "--verbose"]
    command += ["--min-sdk-version", build.setting("minSdk"), str(apk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    scheme = "Verified using v2 scheme (APK Signature Scheme v2): true"
    return done.returncode == 0 and scheme in done.stdout


def test_the_signature_verifies(apk: Path, tmp_path: Path) -> None:
    assert verifies(apk)
    data = bytearray(apk.read_bytes())
    data[len(data) // 2] ^= 1
    control = tmp_path / "control.apk"
    control.write_bytes(data)
    assert not verifies(control)


# The manifest


def manifest_faults(apk: Path) -> list[str]:
    """What the manifest asks for that this app must not."""
    aapt2 = tool("aapt2", "aapt")
    tree = build.run([aapt2, "dump", "xmltree", "--file", "AndroidManifest.xml", str(apk)], "aapt2")
    elements = re.findall(r"^ *E: ([\w-]+) ", tree, re.MULTILINE)
    permissions = re.findall(r'"([\w.]+\.permission\.\w+)" \(Raw', tree)
    faults = [e for e in elements if e in ("provider", "receiver", "queries")]
    names = re.findall(r"E: service [^E]*?android:name\(\w+\)=\"([^\"]+)\"", tree)
    faults += ["service"] * (names != SERVICES)
    allowed = {f"android.permission.{name}" for name in PERMISSIONS}
    faults += [p for p in permissions if p not in allowed]
    for name, value in (("debuggable", "true"), ("usesCleartextTraffic", "true")):
        faults += re.findall(rf"android:{name}\(\w+\)={value}", tree)
    return faults


def test_nothing_is_asked_for_but_what_downloads_need(apk: Path, tmp_path: Path) -> None:
    assert manifest_faults(apk) == []
    text = (build.OUT / "AndroidManifest.xml").read_text(encoding="utf-8")
    provider = '<provider android:name="ai.onnxruntime.TelemetryInitializer"'
    provider += ' android:authorities="x" /></application>'
    text = text.replace("</application>", provider)
    camera = '<uses-permission android:name="android.permission.CAMERA" /><application'
    text = text.replace("</application>", '<service android:name=".Other" /></application>')
    text = text.replace("<application", camera, 1).replace('Traffic="false"', 'Traffic="true"')
    manifest, control = tmp_path / "AndroidManifest.xml", tmp_path / "control.apk"
    manifest.write_text(text, encoding="utf-8")
    command = [tool("aapt2", "aapt"), "link", "-I", str(build.FRAMEWORK), "-o", str(control)]
    command += ["--manifest", str(manifest), str(build.OUT / "resources.zip")]
    build.run(command, "no control")
    faults = manifest_faults(control)
    assert faults[:3] == ["provider", "service", "android.permission.CAMERA"]
    assert len(faults) == 4


def test_versions_of_android_and_processors_are_those_of_the_project(apk: Path) -> None:
    badging = build.run([tool("aapt2", "aapt"), "dump", "badging", str(apk)], "aapt2")
    assert "sdkVersion:'26'" in badging
    assert "targetSdkVersion:'36'" in badging
    assert f"native-code: '{build.ABI}'" in badging
    assert "launchable-activity: name='io.pleexport.app.ChatActivity'" in badging


# The code


def test_no_class_of_telemetry_is_inside(dex: Dex, control_dex: Dex) -> None:
    def telemetry(found: Dex) -> list[str]:
        return [name for name in found.classes if "telemetry" in name.lower()]

    assert telemetry(dex) == []
    assert telemetry(control_dex) == ["ai/onnxruntime/telemetry/HttpClient"]
    # Nor under another name: this is where it would send to.
    mapping = (build.OUT / "mapping.txt").read_text(encoding="utf-8")
    assert "ai.onnxruntime.OrtEnvironment -> " in mapping
    assert re.findall(r"^ai\.onnxruntime\..*elemetry\S* ->.*$", mapping, re.MULTILINE) == []


def test_no_call_is_made_at_run_time(dex: Dex, control_dex: Dex) -> None:
    assert dex.call_sites == 0
    assert control_dex.call_sites == 1


def test_what_native_code_asks_for_by_name_is_there(dex: Dex) -> None:
    (jni,) = build.aar(f"jni/{build.ABI}/libonnxruntime4j_jni.so")
    names = set(re.findall(rb"\x00(ai/onnxruntime/\w+)(?=\x00)", jni.read_bytes()))
    assert len(names) >= 8
    assert [n.decode() for n in names if n.decode() not in dex.classes] == []
    kept = {n for n in dex.classes if n.startswith("ai/onnxruntime/")}
    assert len(kept) < 40  # the archive has 100: the rules are narrow


def missing(found: Dex, api: dict[str, Class]) -> list[str]:
    """Members that code refers to, and that neither it nor Android 8.0 has."""

    def holds(name: str, member: str) -> bool:
        own = found.classes.get(name) or api.get(name)
        if own is None:
            return False
        return member in own.members or any(holds(parent, member) for parent in own.parents)

    def known(name: str, member: str) -> bool:
        # Interfaces have what every object has.
        return holds(name, member) or (
            (name in found.classes or name in api) and holds("java/lang/Object", member)
        )

    return sorted(
        f"{name}.{member}" for name, member in found.references if not known(name, member)
    )


def test_no_member_is_used_that_the_oldest_android_lacks(
    dex: Dex, control_dex: Dex, api_26: dict[str, Class]
) -> None:
    def unexplained(found: Dex) -> list[str]:
        return [m for m in missing(found, api_26) if m.partition("(")[0] not in NEWER]

    assert unexplained(dex) == []
    assert "java/lang/ProcessHandle.pid()J" in unexplained(control_dex)
    # What is explained is used.
    assert {m.partition("(")[0] for m in missing(dex, api_26)} == set(NEWER)


# The shrunk classes, run


def shrunk_tests(folder: Path, rules: list[Path]) -> Path:
    """Library and conformance test in one jar, shrunk by these rules."""
    tests = folder / "tests.jar"
    with zipfile.ZipFile(tests, "w") as archive:
        classes = build.RUNTIME / "target" / "test-classes"
        for path in sorted(classes.rglob("*.class")):
            if re.match(r"(Conformance|Vectors|Cases)", path.name):
                archive.write(path, path.relative_to(classes).as_posix())
    entry = folder / "entry.pro"
    entry.write_text(
        "-keep class io.pleexport.ConformanceTest { *; }\n"
        "-keepattributes RuntimeVisibleAnnotations\n"
        # Class files keep lambdas as calls that are made at run time, whose names this R8 forgets
        # to change; in the APK there are none.
        "-keep class kotlin.jvm.functions.** { *; }\n"
        "-dontwarn ai.onnxruntime.**\n-dontwarn java.lang.**\n",
        encoding="utf-8",
    )
    out = folder / "shrunk.jar"
    programs = [tests, build.RUNTIME / "target" / "pleexport-runtime.jar", desktop_onnxruntime()]
    programs += build.libraries()
    options = ["--classfile", "--lib", str(fetched(JUNIT)), "--output", str(out)]
    command = build.shrinker(programs, [entry, *rules], options)
    build.run(command, "the tests cannot be shrunk")
    return out


def desktop_onnxruntime() -> Path:
    (jar,) = (build.RUNTIME / "target" / "lib").glob("onnxruntime-*.jar")
    return jar


def run_vectors(shrunk: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the conformance test; ONNX Runtime's native library for computers is laid beside it."""
    with zipfile.ZipFile(desktop_onnxruntime()) as archive:
        for name in archive.namelist():
            if name.startswith("ai/onnxruntime/native/linux-x64/") and name.endswith(".so"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    # JUnit's own command stops at the second jar, so what is shrunk goes first on the path.
    command = [tool("java", "openjdk-17-jdk-headless"), f"-Donnxruntime.native.path={folder}"]
    command += [f"-XX:ErrorFile={folder}/error.log", "-XX:+UseSerialGC"]
    command += ["-cp", f"{shrunk}:{fetched(JUNIT)}", "org.junit.platform.console.ConsoleLauncher"]
    command += ["execute", "--select-class", "io.pleexport.ConformanceTest", "--details", "summary"]
    return subprocess.run(
        command, cwd=build.RUNTIME, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_shrunk_library_passes_the_conformance_vectors(tmp_path: Path) -> None:
    done = run_vectors(shrunk_tests(tmp_path, list(build.RULES)), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) tests successful", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 40
    with zipfile.ZipFile(tmp_path / "shrunk.jar") as archive:
        names = [n for n in archive.namelist() if n.endswith(".class")]
    assert "io/pleexport/Runner.class" not in names  # it was renamed


def test_the_vectors_tell_rules_that_are_too_narrow(tmp_path: Path) -> None:
    rules = (build.RUNTIME / "consumer-rules.pro").read_text(encoding="utf-8")
    narrow = tmp_path / "narrow.pro"
    less = re.sub(r"-keepclassmembers enum .*?}\n", "", rules, flags=re.DOTALL)
    assert less != rules
    narrow.write_text(less, "utf-8")
    done = run_vectors(shrunk_tests(tmp_path, [narrow, *build.RULES[1:]]), tmp_path)
    assert done.returncode != 0
    assert re.search(r"[1-9]\d* tests failed", done.stdout)
    assert "not an enum" in done.stdout

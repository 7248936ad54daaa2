"""Files that stand where weights are looked for, and are none that can be read.

Each is known by what it begins with, or else by its name. What it is, and what to do instead, is
told in one sentence each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from pleexport.errors import CheckpointError, PleexportError, UnsupportedError

_SOURCE = "use the safetensors checkpoint that it was made from"
_CONVERT = f"{_SOURCE}, or let the library that wrote it convert it"
_SAVE = "save it again with `model.save_pretrained(folder)`, which writes safetensors"
_HEAD_BYTES = 512


@dataclass(frozen=True)
class Foreign:
    """A kind of file that is not read.

    Attributes:
        what: as in "holds ..., which is not read".
        hint: what to do instead.
        names: patterns of its names.
        begins: what its content has at byte `at`; none for kinds that have no mark.
        told: how the sentence goes on behind the path, where it is not about a format.
    """

    what: str
    hint: str
    names: tuple[str, ...] = ()
    begins: tuple[bytes, ...] = ()
    at: int = 0
    told: str = ""

    def error(self, path: Path) -> PleexportError:
        """What to raise for a file of this kind."""
        if self.told:
            return CheckpointError(f"`{path}` {self.told}", hint=self.hint)
        return UnsupportedError(f"`{path}` holds {self.what}, which is not read", hint=self.hint)

    def named(self, name: str) -> bool:
        """Whether a file of that name is one of this kind."""
        return any(fnmatch(name.lower(), pattern) for pattern in self.names)

    def marks(self, head: bytes) -> bool:
        """Whether a file that begins so is one of this kind."""
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower() if self is _HTML else head[self.at :]
        return any(text.startswith(mark) for mark in self.begins)


_LFS = Foreign(
    "a Git LFS pointer",
    "run `git lfs pull` in the folder, or fetch the file again",
    begins=(b"version https://git-lfs",),
    told="is a Git LFS pointer, not the file itself",
)
_HTML = Foreign(
    "an HTML page",
    "a page of a login or an error was saved in its place; fetch the file again, with a token "
    "where the model asks for one",
    begins=(b"<!doctype html", b"<html", b"<head", b"<!--"),
    told="is an HTML page, not the file itself",
)
_PICKLED = Foreign(
    "pickled weights",
    _SAVE,
    ("*.bin", "*.pt", "*.ckpt", "*.pkl", "*.pickle"),
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
    told="holds pickled weights, which are not opened",
)
_ARCHIVE = Foreign(
    "an archive",
    "unpack it, and pass the folder that has config.json",
    ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z", "*.gz", "*.zst", "*.xz", "*.rar"),
    (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"),
    told="is an archive, not a checkpoint",
)
# What the content says counts first, whatever the name is.
FORMATS = (
    Foreign(
        "GGUF",
        f"{_SOURCE}; for a form called `q4_0-gguf`, that is the one called `q4_0-unquantized`",
        ("*.gguf",),
        (b"GGUF",),
    ),
    Foreign("GGML", _SOURCE, ("*.ggml", "ggml-*.bin"), (b"lmgg", b"tjgg", b"fmgg")),
    Foreign("a LiteRT-LM model", _SOURCE, ("*.litertlm",), (b"LITERTLM",)),
    Foreign("a MediaPipe task", _SOURCE, ("*.task",)),
    Foreign("a TensorFlow Lite graph", _SOURCE, ("*.tflite",), (b"TFL3",), at=4),
    Foreign("an ONNX graph", _SOURCE, ("*.onnx", "*.onnx_data", "*.onnx.data", "*.ort")),
    Foreign("an ExecuTorch program", _SOURCE, ("*.pte", "*.ptd"), (b"ET12",), at=4),
    Foreign("a Core ML model", _SOURCE, ("*.mlmodel", "*.mlpackage", "*.mlmodelc")),
    Foreign("an OpenVINO model", _SOURCE, ("openvino_*.xml", "openvino_*.bin")),
    Foreign("Keras weights", _CONVERT, ("*.h5", "*.hdf5", "*.keras"), (b"\x89HDF\r\n\x1a\n",)),
    Foreign("Flax weights", _CONVERT, ("*.msgpack",)),
    Foreign(
        "a TensorFlow checkpoint",
        _CONVERT,
        ("*.ckpt.index", "*.ckpt.meta", "*.ckpt-*", "*.data-?????-of-?????", "saved_model.pb"),
    ),
    Foreign(
        "an Orbax checkpoint",
        _CONVERT,
        ("_checkpoint_metadata", "manifest.ocdbt", "ocdbt.process_*", "_metadata"),
    ),
    Foreign("NumPy arrays", _CONVERT, ("*.npz", "*.npy"), (b"\x93NUMPY",)),
    Foreign("an MLX model", _SOURCE, ("*.mlx",)),
    Foreign("a NeMo model", _CONVERT, ("*.nemo",)),
    _PICKLED,
    _ARCHIVE,
    Foreign(
        "a download that is not complete",
        "let the download end, or start it again",
        ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2"),
        told="is a download that is not complete",
    ),
)


def refuse_foreign(path: Path, *, of_torch: bool = False) -> None:
    """Refuse a file that is not what its name or place promises.

    Args:
        of_torch: an archive or a pickle is what is looked for.
    Raises:
        CheckpointError: an empty file, a pointer or a web page in place of the file, or an archive.
        UnsupportedError: weights in another format.
    """
    found = recognized(path)
    if found and not (of_torch and found in (_PICKLED, _ARCHIVE)):
        raise found.error(path)


def recognized(path: Path) -> Foreign | None:
    """The kind of a file, by what it begins with, or else by its name; None for none of these."""
    head = _head(path)
    if head == b"":
        return Foreign("an empty file", "fetch the file again", told="is empty: it has 0 bytes")
    if head[4:9] == b"\0\0\0\0{":  # a safetensors header; its length may look like a mark
        return None
    for kind in (_LFS, _HTML, *FORMATS):
        if kind.marks(head):
            return kind
    return named(path.name)


def named(name: str) -> Foreign | None:
    """The kind of a file, by its name alone."""
    return next((kind for kind in FORMATS if kind.named(name)), None)


def first_named(names: Iterable[str]) -> str | None:
    """Of some files, the one that most likely is the model, in a format that is not read."""
    known = [*names]
    return next((name for kind in FORMATS for name in known if kind.named(name)), None)


def refuse_text(path: Path) -> None:
    """Refuse weights that are a text: the message of a server, or a config.

    Raises:
        CheckpointError: with how it begins.
    """
    head = _head(path)
    begin = head[:64]
    if len(begin) >= 8 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in begin):
        shown = " ".join(begin.decode("ascii").split())
        raise CheckpointError(
            f"`{path}` is a text, not weights: it begins with `{shown}`",
            hint="fetch the file again, with a token where the model asks for one",
        )


def _head(path: Path) -> bytes:
    """How a file begins; one byte where that cannot be told, which is no mark of anything."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b"\0"

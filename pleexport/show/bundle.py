"""Where the bytes of a bundle went."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pleexport.runtime.bundle import Bundle, Manifest
from pleexport.show.tables import aligned
from pleexport.sizes import size_text
from pleexport.tied_layout import TIED

ROLES = {
    "model.onnx.data*": "dense weights, read at every token",
    TIED: "output head, read at every token, and its rows",
    "embeddings*.safetensors": "rows of tables, looked up by token id",
    "model.onnx": "dense graph",
    "model.pte": "dense graph and weights, read at every token",
    "tokenizer.json": "tokenizer",
    "parity.json": "parity with the original",
}


def _role(name: str) -> str:
    """What a file of a bundle is there for."""
    return next((role for pattern, role in ROLES.items() if fnmatchcase(name, pattern)), "")


def _chosen(manifest: Manifest) -> list[str]:
    """What a budget stored otherwise."""
    counted = [
        (len(manifest.table_dtypes), "tables"),
        (len(manifest.weight_dtypes), "matrices"),
    ]
    told = [f"{count} {what}" for count, what in counted if count]
    return [f"to fit, {' and '.join(told)} have another dtype"] if told else []


def _merged(manifest: Manifest) -> list[str]:
    """The adapters that the weights have merged into them."""
    named = (
        a.name if a.weight == 1.0 else f"{a.name} times {a.weight:g}" for a in manifest.adapters
    )
    return [f"adapters merged: {', '.join(named)}"] if manifest.adapters else []


def _fetched(manifest: Manifest) -> list[str]:
    """Where the checkpoint was fetched from, if it was."""
    if manifest.source is None or manifest.source.commit is None:
        return []
    return [f"built from {manifest.source.repository} at {manifest.source.commit}"]


def describe_bundle(bundle: Bundle) -> str:
    """Where the bytes of a bundle went."""
    manifest, total = bundle.manifest, bundle.nbytes
    lines = [
        f"{bundle.path}: {manifest.family} for {manifest.target}, "
        f"{manifest.weight_dtype} weights, {manifest.table_dtype} tables, "
        f"{manifest.cache_dtype} cache, context {manifest.context:,}",
        *_chosen(manifest),
        *_merged(manifest),
        *_fetched(manifest),
        "",
    ]
    records = sorted(manifest.files, key=lambda record: -record.size)
    rows = [(r.name, size_text(r.size), f"{r.size / total:.1%}", _role(r.name)) for r in records]
    lines += aligned([*rows, ("total", size_text(total), "", "")], align="<>><")
    parity = manifest.parity
    if parity.checked and parity.max_logit_error is not None:
        lines += [
            "",
            f"Parity with the PyTorch original: {'passed' if parity.passed else 'FAILED'}, "
            f"largest logit error {parity.max_logit_error:.1e} of the range.",
        ]
    return "\n".join(lines)

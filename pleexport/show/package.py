"""What a package holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from pleexport.show.tables import aligned
from pleexport.sizes import size_text

if TYPE_CHECKING:
    from pleexport.export.packaging import Package


def describe_package(package: Package) -> str:
    """The packs and their files, and whether anybody can tell who made them."""
    index = package.index
    lines = [f"{package.path}: {index.bundle} for {index.target}", ""]
    rows = []
    for pack in sorted({file.pack for file in index.files}):
        own = sorted((f for f in index.files if f.pack == pack), key=lambda file: -file.bytes)
        rows.append((pack, size_text(sum(file.bytes for file in own))))
        rows += [(f"  {file.name}", size_text(file.bytes)) for file in own]
    lines += aligned([*rows, ("total", size_text(index.bytes))], align="<>")
    signed = (
        "The index is signed: index.json.sig."
        if package.signed
        else "Nothing is signed: who changes a file can change the index too. "
        "`--sign KEY.pem` signs it."
    )
    return "\n".join([*lines, "", *package.notes, signed])


def package_fields(package: Package) -> dict[str, Any]:
    """The same as data."""
    return {
        "package": str(package.path),
        "signed": package.signed,
        "notes": package.notes,
        **msgspec.to_builtins(package.index),
    }

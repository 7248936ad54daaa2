"""Targets as text."""

from __future__ import annotations

from collections.abc import Sequence

from pleexport.show.tables import aligned, paragraph
from pleexport.sizes import size_text
from pleexport.targets import Limits, Target


def describe_target(target: Target) -> str:
    """A target in full, for people."""
    limits = {name: getattr(target.limits, name) for name in Limits.__struct_fields__}
    settings = {
        "backend": f"{target.backend}, opset {target.opset}",
        "runtime": ", ".join(f"{name} {version}" for name, version in target.runtime.items()),
        "page size": f"{target.page_size:,} bytes",
        "table dtype": target.table_dtype,
        "weight dtype": f"{target.weight_dtype}, blocks of up to {target.block_size}",
        "context": f"{target.context:,} positions",
    } | {
        name.removesuffix("_bytes").replace("_", " "): size_text(value)
        for name, value in limits.items()
        if value is not None
    }
    lines = [f"{target.name}: {target.description}", ""]
    lines += aligned(settings.items(), align="<<", indent=2)
    lines += ["", "Packaging"]
    for step in target.packaging:
        lines += paragraph(step)
    return "\n".join(lines)


def describe_targets(targets: Sequence[Target]) -> str:
    """The names and descriptions of targets."""
    return "\n".join(aligned(((t.name, t.description) for t in targets), align="<<"))

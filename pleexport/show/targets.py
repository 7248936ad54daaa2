"""Targets as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from pleexport.show.tables import aligned, paragraph
from pleexport.sizes import size_text
from pleexport.targets import Limits, Target


def describe_target(target: Target) -> str:
    """A target in full, for people."""
    limits = {name: getattr(target.limits, name) for name in Limits.__struct_fields__}
    blocks = f"blocks of up to {target.block_size}"
    scales = "one scale for each output" if target.per_channel else blocks
    settings = {
        "backend": f"{target.backend}, opset {target.opset}, for a {target.processor.upper()}",
        "runtime": _packages(target.runtime),
        "page size": f"{target.page_size:,} bytes",
        "table dtype": target.table_dtype,
        "weight dtype": f"{target.weight_dtype}, {scales}",
        "context": f"{target.context:,} positions",
    } | {
        name.removesuffix("_bytes").replace("_", " "): size_text(value)
        for name, value in limits.items()
        if value is not None
    }
    if target.packs:
        settings["packs"] = f"{target.packs.form}, {target.packs.delivery}"
    lines = [f"{target.name}: {target.description}", ""]
    lines += aligned(settings.items(), align="<<", indent=2)
    for backend, own in target.backends.items():
        fields = {n: v for n, v in msgspec.structs.asdict(own).items() if v is not None}
        if own.runtime is not None:
            fields["runtime"] = _packages(own.runtime)
        rows = [(name.replace("_", " "), str(value)) for name, value in fields.items()]
        lines += ["", f"With --backend {backend}", *aligned(rows, align="<<", indent=2)]
    lines += ["", "Packaging"]
    for step in target.packaging:
        lines += paragraph(step)
    return "\n".join(lines)


def _packages(runtime: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in runtime.items())


def describe_targets(targets: Sequence[Target]) -> str:
    """The names and descriptions of targets."""
    return "\n".join(aligned(((t.name, t.description) for t in targets), align="<<"))

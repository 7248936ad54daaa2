"""One self-contained HTML page out of sections: text, tables, plots."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Cells of text; the first column names the rows."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        plots: see `svg`.
    """

    title: str
    text: str
    tables: Sequence[Table] = ()
    plots: Sequence[str] = field(default=(), repr=False)


def svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bars(values: Mapping[str, tuple[float, float, float]], label: str) -> str:
    """By name a median with the least and the largest value, as SVG."""
    figure = Figure(figsize=(7.5, 0.45 * len(values) + 0.8), layout="constrained")
    axes = figure.subplots()
    names = list(values)[::-1]
    medians = [values[name][0] for name in names]
    below = [values[name][0] - values[name][1] for name in names]
    above = [values[name][2] - values[name][0] for name in names]
    axes.barh(names, medians, xerr=[below, above], capsize=3)
    axes.set_xlabel(label)
    return svg(figure)


def machine_section(machine: Mapping[str, Any]) -> Section:
    """What `machine.describe` found."""
    rows = [
        ("processor", f"{machine['processor']}, {machine['cores']} cores"),
        ("memory, reading", f"{machine['memory_read_gb_per_second']:.1f} GB/s"),
        ("disk, writing", f"{machine['disk_write_gb_per_second']:.2f} GB/s"),
        ("disk, reading", f"{machine['disk_read_gb_per_second']:.2f} GB/s"),
        ("cold read of 4 KiB", f"{machine['cold_4k_read_microseconds']:.0f} µs"),
        ("system", f"{machine['platform']}, Python {machine['python']}"),
        *((name, version) for name, version in machine["versions"].items() if version),
    ]
    return Section("Machine", "Limits are measured in the same run.", [Table(("", ""), rows)])


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page."""
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=select_autoescape(["html"])
    )
    page = environment.get_template("page.html").render(title=title, sections=sections)
    path.write_text(page, encoding="utf-8")

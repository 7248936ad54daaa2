"""A parity report as one self-contained HTML page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pleexport.errors import MissingDependencyError
from pleexport.parity.report import EXACT_LOGITS, ParityReport
from pleexport.runtime.bundle import Bundle
from pleexport.show.bundle import ROLES
from pleexport.show.parity import row_verdict, text_counts, text_verdict, verdict
from pleexport.sizes import size_text


def write_html(report: ParityReport, bundle: Path, path: Path) -> None:
    """Write a parity report as one self-contained HTML page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    opened = Bundle(bundle)
    environment = Environment(
        loader=PackageLoader("pleexport.show", "."), autoescape=select_autoescape(["html"])
    )
    page = environment.get_template("report.html").render(
        report=report,
        manifest=opened.manifest,
        files=[(r.name, size_text(r.size), ROLES.get(r.name, "")) for r in opened.manifest.files],
        verdict=verdict(report),
        row_verdict=row_verdict,
        text_counts=text_counts,
        text_verdict=text_verdict,
        exact_limit=EXACT_LOGITS,
        layers_plot=_plot_layers(report) if report.layer_errors else None,
        sizes_plot=_plot_sizes(opened),
    )
    path.write_text(page, encoding="utf-8")


def _plot_layers(report: ParityReport) -> str:
    """Relative error by layer, as SVG."""
    figure, axes = _figure(height=2.6)
    layers = range(len(report.layer_errors))
    axes.semilogy(layers, [max(e, 1e-12) for e in report.layer_errors], marker="o", markersize=4)
    if report.first_diverging_layer is not None:
        axes.axvline(report.first_diverging_layer, color="#b3261e", linestyle="--")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error (RMS)")
    axes.grid(alpha=0.3)
    return _svg(figure)


def _plot_sizes(bundle: Bundle) -> str:
    """Bytes by file, as SVG."""
    records = sorted(bundle.manifest.files, key=lambda record: record.size)
    figure, axes = _figure(height=0.35 * len(records) + 0.7)
    axes.barh([r.name for r in records], [r.size for r in records])
    axes.xaxis.set_major_formatter(lambda nbytes, _: size_text(round(nbytes)))
    return _svg(figure)


def _figure(*, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError(
            "an HTML report needs matplotlib", hint="pip install 'pleexport[export]'"
        ) from err
    figure = Figure(figsize=(7.5, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Ids and the date would differ from one run to the next.
    with mpl.rc_context({"svg.hashsalt": "pleexport"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

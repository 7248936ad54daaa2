"""What a person reads: bundle sizes, parity as text and as an HTML page, statistics of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from pleexport.errors import MissingDependencyError
from pleexport.parity.compare import EXACT_LOGITS, ParityReport, TableCheck
from pleexport.runtime.bundle import BLOB, Bundle
from pleexport.runtime.stats import Stats
from pleexport.units import size_text

_ROLES = {
    "model.onnx.data": "dense weights, read at every token",
    BLOB: "rows of all tables, looked up by token id",
    "model.onnx": "dense graph",
    "model.pte": "dense graph and weights, read at every token",
    "tokenizer.json": "tokenizer",
    "parity.json": "parity with the original",
}


def describe_bundle(bundle: Bundle) -> str:
    """Where the bytes of a bundle went."""
    manifest, total = bundle.manifest, bundle.nbytes
    lines = [
        f"{bundle.path}: {manifest.family} for {manifest.target}, "
        f"{manifest.weight_dtype} weights, {manifest.table_dtype} tables, "
        f"{manifest.cache_dtype} cache, context {manifest.context:,}",
        "",
    ]
    records = sorted(manifest.files, key=lambda record: -record.size)
    rows = [
        (r.name, size_text(r.size), f"{r.size / total:.1%}", _ROLES.get(r.name, ""))
        for r in records
    ]
    lines += table_text([*rows, ("total", size_text(total), "", "")], align="<>><")
    parity = manifest.parity
    if parity.checked and parity.max_logit_error is not None:
        lines += [
            "",
            f"Parity with the PyTorch original: {'passed' if parity.passed else 'FAILED'}, "
            f"largest logit error {parity.max_logit_error:.1e} of the range.",
        ]
    return "\n".join(lines)


def describe_parity(report: ParityReport) -> str:
    """A parity report as text."""
    lines = [f"Compared with {report.oracle}.", "", "Rows, every one read back:"]
    for check in report.tables:
        result = row_verdict(check)
        lines.append(f"  {check.table} ({check.dtype}, {check.rows:,} rows): {result}")
    limit = f"limit {EXACT_LOGITS:.0e}" if report.exact else "judged by KL divergence"
    lines += ["", f"Logits ({limit}):"]
    rows: list[tuple[str, ...]] = [("", "tokens", "max error / range", "KL, nats", "same best")]
    rows += [
        (
            check.mode,
            str(check.tokens),
            f"{check.relative_error:.1e}",
            f"{max(check.kl, 0):.1e}",
            f"{check.top1_agreement:.1%}",
        )
        for check in report.logits
    ]
    lines += [f"  {line}" for line in table_text(rows, align="<>>>>")]
    if report.text:
        text = report.text
        lines += ["", f"Greedy text: {text.equal_tokens} of {text.tokens} tokens equal."]
    if report.fidelity:
        lines += ["", f"What rounding costs, on {report.fidelity_tokens} tokens:"]
        rows = [("", "KL, nats", "perplexity", "same best")]
        if report.original_perplexity is not None:
            rows.append(("original", "", f"{report.original_perplexity:.2f}", ""))
        rows += [
            (f.what, f"{f.kl:.2e}", f"{f.perplexity:.2f}", f"{f.top1_agreement:.1%}")
            for f in report.fidelity
        ]
        lines += [f"  {line}" for line in table_text(rows, align="<>>>")]
    lines.append("")
    if report.passed:
        lines.append(f"PASSED: {verdict(report)}.")
    else:
        lines += ["FAILED:", *(f"  - {failure}" for failure in report.failures)]
        if report.first_diverging_layer is not None:
            lines.append(f"  First diverging layer: {report.first_diverging_layer}")
    return "\n".join(lines)


def row_verdict(check: TableCheck) -> str:
    """How close the rows of a table are to the source."""
    if check.first_bad_row is not None:
        return f"DIFFERS first at token id {check.first_bad_row}"
    if check.lossless:
        return "as the source, bit for bit"
    if check.dtype == "int4":
        return "no group further off than rounding to nearest"
    return "within half a step"


def verdict(report: ParityReport) -> str:
    """What a passed check says."""
    if report.exact:
        return "the bundle computes what the original computes"
    return "the rounded bundle stays as close to the original as its dtypes allow"


def describe_stats(stats: Stats) -> str:
    """Statistics of a run as text."""
    memory = "not known on this system"
    if stats.anonymous_bytes is not None and stats.file_backed_bytes is not None:
        memory = (
            f"{size_text(stats.anonymous_bytes)} anonymous, "
            f"{size_text(stats.file_backed_bytes)} file-backed"
        )
    rows = [
        (
            "prefill",
            f"{stats.prompt_tokens} tokens, {stats.prefill_tokens_per_second:,.0f} tokens/s",
        ),
        (
            "decode",
            f"{stats.generated_tokens} tokens, {stats.decode_tokens_per_second:,.1f} tokens/s",
        ),
        ("first token", f"{stats.first_token_seconds * 1e3:,.1f} ms"),
        ("memory", memory),
        (
            "lookups",
            f"{stats.rows:,} rows, {size_text(stats.row_bytes)}, {stats.pages:,} distinct pages",
        ),
        (
            "page faults",
            f"{stats.minor_page_faults:,} minor, {stats.major_page_faults:,} major",
        ),
        ("ended by", stats.finish_reason),
    ]
    return "\n".join(table_text(rows, align="<<"))


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
        files=[(r.name, size_text(r.size), _ROLES.get(r.name, "")) for r in opened.manifest.files],
        verdict=verdict(report),
        row_verdict=row_verdict,
        exact_limit=EXACT_LOGITS,
        layers_plot=_plot_layers(report) if report.layer_errors else None,
        sizes_plot=_plot_sizes(opened),
    )
    path.write_text(page, encoding="utf-8")


def table_text(rows: Sequence[Sequence[str]], *, align: str) -> list[str]:
    """Rows of cells as aligned lines; `align` has "<" or ">" for each column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    return [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip()
        for row in rows
    ]


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
    axes.barh([r.name for r in records], [r.size / 1e6 for r in records])
    axes.set_xlabel("MB")
    return _svg(figure)


def _figure(*, height: float) -> tuple[Any, Any]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as err:
        raise MissingDependencyError(
            "an HTML report needs matplotlib", hint="pip install 'pleexport[export]'"
        ) from err
    mpl.rcParams["svg.hashsalt"] = "pleexport"
    figure = Figure(figsize=(7.5, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

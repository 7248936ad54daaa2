"""A parity report as text, and its verdicts as sentences."""

from __future__ import annotations

from pleexport.parity.report import EXACT_LOGITS, ParityReport, TableCheck, TextCheck
from pleexport.show.tables import aligned, paragraph

# What lines of fidelity are called, where it is not `Fidelity.what`.
_ROUNDED = {"activations": "activations not rounded"}


def describe_parity(report: ParityReport) -> str:
    """A parity report as text."""
    lines = [f"Compared with {report.oracle}.", ""]
    if report.tokenizer:
        lines += [f"Text and ids ({text_counts(report.tokenizer)}):"]
        lines += [f"  {text_verdict(report.tokenizer)}", ""]
    lines.append("Rows, every one read back:")
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
    lines += aligned(rows, align="<>>>>", indent=2)
    if report.text:
        text = report.text
        lines += ["", f"Greedy text: {text.equal_tokens} of {text.tokens} tokens equal."]
    if report.fidelity:
        lines += ["", f"What rounding costs, on {report.fidelity_tokens} tokens:"]
        rows = [("", "KL, nats", "perplexity", "same best")]
        if report.original_perplexity is not None:
            rows.append(("original", "", f"{report.original_perplexity:.2f}", ""))
        rows += [
            (
                _ROUNDED.get(f.what, f.what),
                f"{f.kl:.2e}",
                f"{f.perplexity:.2f}",
                f"{f.top1_agreement:.1%}",
            )
            for f in report.fidelity
        ]
        lines += aligned(rows, align="<>>>", indent=2)
    lines.append("")
    if report.passed:
        lines.append(f"PASSED: {verdict(report)}.")
    else:
        lines.append("FAILED:")
        for failure in report.failures:
            lines += paragraph(failure)
        if report.first_diverging_layer is not None:
            lines.append(f"  First diverging layer: {report.first_diverging_layer}")
    return "\n".join(lines)


def text_counts(check: TextCheck) -> str:
    """How much of text was compared."""
    counted = f"{check.texts:,} texts, {check.streams:,} streams"
    if not check.template:
        return f"{counted}, no chat template"
    refused = f", {check.refused} of them refused by both" if check.refused else ""
    formatted = "" if check.formatted is None else f", {check.formatted:,} as data"
    return f"{counted}, {check.conversations} conversations by {check.template}{refused}{formatted}"


def text_verdict(check: TextCheck) -> str:
    """How text and ids compare with the original's."""
    if check.differences:
        return "DIFFER, see below"
    if check.original is None:
        return f"not compared with an original: {check.not_compared}"
    return f"equal to those of {check.original}"


def row_verdict(check: TableCheck) -> str:
    """How close the rows of a table are to the source."""
    if check.first_bad_row is not None:
        return f"DIFFERS first at token id {check.first_bad_row}"
    if check.lossless:
        return "as the source, bit for bit"
    if check.dtype == "int4" or check.tied:
        return "no group further off than rounding to nearest"
    return "within half a step"


def verdict(report: ParityReport) -> str:
    """What a passed check says."""
    if report.exact:
        return "the bundle computes what the original computes"
    return "the rounded bundle stays as close to the original as its dtypes allow"

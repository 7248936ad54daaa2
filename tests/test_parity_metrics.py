"""Distances between logits, and between hidden values, on numbers that can be told by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from pleexport.parity import metrics
from pleexport.parity.layers import first_diverging_layer
from pleexport.parity.logits import check_logits


def array(*rows: list[float]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def test_mean_kl_is_that_of_two_coins() -> None:
    fair, loaded = array([0.0, 0.0]), array([math.log(3), 0.0])
    expected = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert metrics.mean_kl(fair, got=loaded) == pytest.approx(expected)
    assert metrics.mean_kl(loaded, got=fair) != pytest.approx(expected), "it has a direction"
    assert metrics.mean_kl(fair, got=fair + 7) == pytest.approx(0, abs=1e-12)
    both = metrics.mean_kl(np.concatenate([fair, fair]), got=np.concatenate([fair, loaded]))
    assert both == pytest.approx(expected / 2)


def test_log_softmax_of_large_logits_is_finite() -> None:
    got = metrics.log_softmax(array([1e30, 0.0]))
    assert got.dtype == np.float64
    assert got[0, 0] == 0
    assert np.isfinite(got).all()


def test_correlation_takes_the_mean_of_each_position_off() -> None:
    reference = array([1.0, 2.0, 4.0], [0.0, 5.0, 1.0])
    shifted = 3 * reference + array([10.0], [-10.0])
    assert metrics.correlation(reference, got=shifted) == pytest.approx(1)
    assert metrics.correlation(reference, got=-reference) == pytest.approx(-1)
    assert metrics.correlation(reference, got=np.zeros_like(reference)) == 0


def test_relative_rms_is_a_share_of_the_expected() -> None:
    expected = array([3.0, 4.0])
    assert metrics.relative_rms(expected, got=1.1 * expected) == pytest.approx(0.1, rel=1e-5)
    assert metrics.relative_rms(expected, got=expected) == 0
    assert metrics.relative_rms(0 * expected, got=expected) > 1e20


@pytest.mark.parametrize(
    ("errors", "exact", "first"),
    [
        ((1e-4, 1e-4), True, None),
        ((1e-4, 2e-3, 1.0), True, 1),
        ((1e-4, math.nan), True, 1),
        ((1e-4, 2e-3), False, None),
        ((0.6, 0.1), False, 0),
        ((math.nan,), False, 0),
        ((), True, None),
    ],
)
def test_the_first_layer_beyond_the_limit_is_named(
    errors: tuple[float, ...], exact: bool, first: int | None
) -> None:
    assert first_diverging_layer(errors, exact=exact) == first


def test_check_logits_counts_near_ties_as_agreement() -> None:
    reference = array([10.0, 9.9995, 0.0], [10.0, 9.99, 0.0], [0.0, 1.0, 0.0])
    got = array([9.9, 10.0, 0.0], [9.9, 10.0, 0.0], [0.0, 1.0, 0.5])
    check = check_logits("prefill", reference=reference, got=got)
    assert (check.mode, check.tokens, check.near_ties) == ("prefill", 3, 1)
    assert check.top1_agreement == pytest.approx(2 / 3), "the second is no tie"
    assert check.logit_range == 10
    assert check.max_error == pytest.approx(0.5)
    assert check.relative_error == pytest.approx(0.05)

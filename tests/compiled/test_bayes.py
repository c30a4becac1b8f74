"""Logarithms of sums, as scipy computes them."""

import numpy as np
from scipy.special import logsumexp as by_scipy

from app.compiled.bayes import logsumexp


def test_sums_of_what_is_impossible_or_infinite_are_those_of_scipy():
    values = np.array([-np.inf, np.inf, np.nan, -1e308, 0.0, 1.0, 1e308])
    rows = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(-1, 3)

    with np.errstate(all="ignore"):
        np.testing.assert_allclose(logsumexp(rows), by_scipy(rows, axis=1), 1e-14)

"""Means over runs, against hand-computed ones."""

import numpy as np
import pytest

from ip2p.report.ablations import over_runs


def test_an_interval_is_students_over_runs():
    found = over_runs([0.2, 0.4, 0.6])
    # s = 0.2, t(2) = 4.3027: 0.4 +- 4.3027 * 0.2 / sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((0.4, -0.09683, 0.89683), abs=1e-4)
    assert found.count == 3


def test_one_run_has_no_interval():
    found = over_runs([0.5])
    assert found.mean == 0.5 and np.isnan(found.low) and np.isnan(found.high)

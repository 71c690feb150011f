"""DAPO's soft punishment of long calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rl.algorithms.settings import Overlong
from lightning_rl.algorithms.shaping import overlong


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0), (800, 0), (801, -0.005), (900, -0.5), (1000, -1), (1001, -1), (9000, -1)]
)
def test_by_hand(length, expected):
    assert overlong(length, Overlong(buffer=0.2, penalty=1.0), 1000) == pytest.approx(expected)
    assert overlong(length, Overlong(buffer=0.2, penalty=0.5), 1000) == pytest.approx(expected / 2)


@given(st.integers(0, 5000), st.integers(2, 4096), st.data())
def test_it_is_the_papers_equation(length, l_max, data):
    l_cache = data.draw(st.integers(1, l_max))
    if length <= l_max - l_cache:
        expected = 0.0
    elif length <= l_max:
        expected = ((l_max - l_cache) - length) / l_cache
    else:
        expected = -1.0
    assert overlong(length, Overlong(buffer=l_cache / l_max, penalty=1.0), l_max) == pytest.approx(expected, abs=1e-9)

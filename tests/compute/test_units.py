"""Units as a person reads them, at their edges too."""

import pytest

from lgp.compute.units import flop_text, time_text


@pytest.mark.parametrize(
    ("flop", "text"),
    [
        (0, "0 FLOP"),
        (1, "1 FLOP"),
        (999, "999 FLOP"),
        (999.6, "1 kFLOP"),
        (1e3, "1 kFLOP"),
        (2.345e6, "2.35 MFLOP"),
        (2.3e10, "23 GFLOP"),
        (9.996e11, "1 TFLOP"),
        (1.5e15, "1.5 PFLOP"),
        (4e18, "4 EFLOP"),
        (3.14e23, "314 ZFLOP"),
    ],
)
def test_operations_have_three_digits_and_a_prefix(flop: float, text: str) -> None:
    assert flop_text(flop) == text


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0, "0 s"),
        (0.5 / 3600, "0.5 s"),
        (59 / 3600, "59 s"),
        (1 / 60, "1 min"),
        (0.09, "5.4 min"),
        (59 / 60, "59 min"),
        (1, "1 h"),
        (12.34, "12.3 h"),
        (47, "47 h"),
        (48, "2 days"),
        (24 * 100, "100 days"),
    ],
)
def test_time_is_in_the_unit_that_fits(hours: float, text: str) -> None:
    assert time_text(hours) == text

"""Bands and levels: where noise lies over depth, the patterns against their formulas, and every refusal."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.errors import UserError
from stackwise_jax.objectives.bands import PATTERNS, band_edges, bands_of, levels
from stackwise_jax.schema import ObjectiveConfig


def depth(**fields: Any) -> ObjectiveConfig:
    return ObjectiveConfig(name="diffusion", time="depth", rate_min=1e-3, rate_max=1.0, **fields)


def rates(**fields: Any) -> list[float]:
    n_bands = fields.pop("n_bands")
    return [low for low, high in levels(depth(**fields), n_bands) if low == high]


def test_bands_cover_the_range_in_the_order_of_noise():
    bands = bands_of(depth(), 4)
    assert bands == band_edges(4, 1e-3, 1.0, "high_to_low")
    assert (bands[0][1], bands[-1][0]) == (1.0, 1e-3)
    assert bands_of(depth(noise_order="low_to_high"), 4) == bands[::-1]


def test_a_range_without_width_has_no_bands():
    with pytest.raises(UserError, match=r"rate_min=0\.15 and objective\.rate_max=0\.15 leave no range"):
        band_edges(2, 0.15, 0.15, "high_to_low")


EXPECTED = {
    "linear": [0.9, 0.65, 0.4, 0.15],
    "cosine": [0.9, 0.15 + 0.75 * 0.75, 0.15 + 0.75 * 0.25, 0.15],
    "exponential": [0.9, *(0.15 + 0.75 * (math.exp(p) - 1) / (math.e - 1) for p in (2 / 3, 1 / 3)), 0.15],
    "geometric": [0.9, 0.9 * 6 ** (-1 / 3), 0.9 * 6 ** (-2 / 3), 0.15],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_levels_follow_their_pattern(pattern: str):
    assert rates(levels=pattern, n_bands=4) == pytest.approx(EXPECTED[pattern], rel=1e-9)
    others = [EXPECTED[other] for other in PATTERNS if other != pattern]
    assert all(rates(levels=pattern, n_bands=4) != pytest.approx(other, rel=1e-3) for other in others)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(2, 12), st.floats(0.01, 0.4), st.floats(0.5, 1.0))
def test_levels_fall_from_the_heaviest_to_the_lightest(pattern: str, n_bands: int, low: float, high: float):
    found = rates(levels=pattern, n_bands=n_bands, level_min=low, level_max=high)
    assert len(found) == n_bands
    assert (found[0], found[-1]) == (high, low)
    assert found == sorted(set(found), reverse=True)


def test_a_list_of_levels_is_taken_as_it_is():
    assert rates(levels="0.9, 0.5,0.15", n_bands=3) == [0.9, 0.5, 0.15]
    assert rates(levels="0.5", n_bands=1) == [0.5]
    assert bands_of(depth(levels="0.9,0.5"), 2) == ((0.9, 0.9), (0.5, 0.5))
    assert bands_of(depth(levels="0.9,0.5", noise_order="low_to_high"), 2) == ((0.5, 0.5), (0.9, 0.9))


@pytest.mark.parametrize(
    ("fields", "n_bands", "complaint"),
    [
        ({"levels": "liner"}, 4, "objective.levels='liner' is none of.*Did you mean \"linear\""),
        ({"levels": "linear"}, 1, 'needs two bands or more.*"0.9"'),
        ({"levels": "linear", "level_min": 0.9}, 4, "level_min=0.9 and level_max=0.9 must be"),
        ({"levels": "geometric", "level_min": 0.0}, 4, "level_min=0.0"),
        ({"levels": "linear", "level_max": 1.5}, 4, "level_max=1.5"),
        ({"levels": "0.9,0.5"}, 3, "lists 2 rates for 3 bands"),
        ({"levels": "0.9,half"}, 2, "must be rates in"),
        ({"levels": "0.9,,0.5"}, 2, "must be rates in"),
        ({"levels": "1.2,0.5"}, 2, "must be rates in"),
        ({"levels": "0.5,0"}, 2, "must be rates in"),
        ({"levels": "0.5,nan"}, 2, "must be rates in"),
        ({"levels": "0.5,0.9"}, 2, "must fall.*noise_order='low_to_high'"),
        ({"levels": "0.5,0.5"}, 2, "must fall"),
    ],
)
def test_malformed_levels_are_refused(fields: dict[str, Any], n_bands: int, complaint: str):
    with pytest.raises(UserError, match=complaint):
        levels(depth(**fields), n_bands)

"""How noise is laid out over depth: bands of rates that cover a range, or one fixed rate (a level) for each."""

import itertools
import math
import typing

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.schema import ObjectiveConfig

Band = tuple[float, float]
"""(low, high) of the masked fraction; equal for a level."""

PATTERNS = ("linear", "cosine", "exponential", "geometric")


def bands_of(objective: ObjectiveConfig, n_bands: int) -> tuple[Band, ...]:
    """The bands of a run, leftmost stacks first: `objective.levels` where given, else equal parts of its range.

    Raises:
      UserError: as `band_edges` and `levels`.
    """
    if not objective.levels:
        low, high = typing.cast(float, objective.rate_min), typing.cast(float, objective.rate_max)
        return band_edges(n_bands, low, high, objective.noise_order)
    heaviest_first = levels(objective, n_bands)
    return heaviest_first if objective.noise_order == "high_to_low" else heaviest_first[::-1]


def band_edges(n_bands: int, low: float, high: float, noise_order: str) -> tuple[Band, ...]:
    """Cuts (low, high] into `n_bands` bands of equal width, leftmost stacks first.

    Under the bound's weight 1/r on an expected n r masked places every rate is the same work, so bands of equal width
    have equal mass (the split of DiffusionBlocks, arXiv 2506.14202, at alpha_b = 1 - b/B). Neighbours share an edge
    exactly, and the outermost edges are `low` and `high` exactly.

    Args:
      noise_order: high_to_low (the leftmost band is the heaviest) or low_to_high.

    Raises:
      UserError: a range without width.

    >>> band_edges(4, 0.0, 1.0, "high_to_low")
    ((0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25))
    """
    if not low < high:
        raise UserError(
            f"objective.rate_min={low} and objective.rate_max={high} leave no range to cut into bands; set them apart, "
            "or give fixed rates by objective.levels"
        )
    inner = (high + (low - high) * band / n_bands for band in range(1, n_bands))
    edges = [high, *inner, low]
    bands = tuple((lower, upper) for upper, lower in itertools.pairwise(edges))
    return bands if noise_order == "high_to_low" else bands[::-1]


def levels(objective: ObjectiveConfig, n_bands: int) -> tuple[Band, ...]:
    """The fixed rates of `objective.levels`, heaviest first, each as a band (r, r).

    A pattern runs from `level_max` to `level_min`. With p from 1 down to 0 in equal steps, r = min + (max - min) g(p):
    linear g = p, cosine g = (1 - cos(pi p)) / 2, exponential g = (e^p - 1) / (e - 1), the three of the original
    StackWise; geometric has equal ratios, r = max (min / max)^(1 - p).

    Raises:
      UserError: an unknown pattern, one for a single band or without range, or a list that is not `n_bands` falling
        rates in (0, 1].
    """
    spec = objective.levels
    is_list = "," in spec or _as_number(spec) is not None
    rates = _listed(spec, n_bands) if is_list else _pattern(objective, n_bands)
    return tuple((rate, rate) for rate in rates)


def _pattern(objective: ObjectiveConfig, n_bands: int) -> list[float]:
    spec, low, high = objective.levels, objective.level_min, objective.level_max
    if spec not in PATTERNS:
        raise UserError(
            f"objective.levels={spec!r} is none of: {', '.join(PATTERNS)}, nor a list of rates such as "
            f'"0.9,0.5,0.15".{did_you_mean(spec, PATTERNS)}'
        )
    if not 0.0 < low < high <= 1.0:
        raise UserError(
            f"objective.level_min={low} and level_max={high} must be two rates in (0, 1], the lower one first"
        )
    if n_bands == 1:
        raise UserError(f'objective.levels={spec!r} needs two bands or more; give a single one its rate: "{high}"')
    shares = [1.0 - band / (n_bands - 1) for band in range(n_bands)]
    if spec == "geometric":
        rates = [high * (low / high) ** (1.0 - p) for p in shares]
    else:
        rates = [low + (high - low) * _curve(spec, p) for p in shares]
    return [high, *rates[1:-1], low]  # the ends as they were given, not to rounding


def _curve(pattern: str, p: float) -> float:
    if pattern == "cosine":
        return (1.0 - math.cos(math.pi * p)) / 2.0
    return math.expm1(p) / math.expm1(1.0) if pattern == "exponential" else p


def _listed(spec: str, n_bands: int) -> list[float]:
    entries = [_as_number(entry) for entry in spec.split(",")]
    rates = [rate for rate in entries if rate is not None and 0.0 < rate <= 1.0]
    if len(rates) < len(entries):
        raise UserError(f'objective.levels={spec!r} must be rates in (0, 1], such as "0.9,0.5,0.15"')
    if len(rates) != n_bands:
        raise UserError(f"objective.levels={spec!r} lists {len(rates)} rates for {n_bands} bands; list one for each")
    if any(heavier <= lighter for heavier, lighter in itertools.pairwise(rates)):
        raise UserError(
            f"objective.levels={spec!r} must fall; list the heaviest first, and set objective.noise_order="
            "'low_to_high' to give it to the rightmost stacks"
        )
    return rates


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

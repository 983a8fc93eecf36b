"""Fields that are read as text: budgets and mixtures of sources."""

import math
import re

from stackwise_jax.checks.choices import require
from stackwise_jax.errors import UserError


def weighted_sources(mixture: str, *, field: str = "data.source") -> list[tuple[str, float | None]]:
    """Takes a mixture apart into sources and their weights, all given or all None.

    >>> weighted_sources("books/*.txt@0.3; wiki/*.jsonl.xz@0.7")
    [('books/*.txt', 0.3), ('wiki/*.jsonl.xz', 0.7)]
    """
    sources: list[tuple[str, float | None]] = []
    for entry in filter(None, map(str.strip, mixture.split(";"))):
        name, _, last = entry.rpartition("@")
        try:
            weight = float(last) if name else None
        except ValueError:  # the @ is part of a name
            weight = None
        if weight is not None:
            in_range = 1e-6 <= weight <= 1e6
            require(in_range, f"{field}={mixture!r} weighs {name!r} by {last}; weights lie between 1e-6 and 1e6")
        sources.append((entry if weight is None else name.strip(), weight))
    require(bool(sources), f'{field}={mixture!r} names no source; give "embedded", files and globs, or tfds:NAME')
    weights = [weight for _, weight in sources]
    if None in weights and any(weights):
        lacking = sources[weights.index(None)][0]
        raise UserError(f"{field}={mixture!r} gives {lacking!r} no weight but others one; end all in @WEIGHT, or none")
    return sources


_BUDGET = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)([kMB]?) +(steps?|tokens?)")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def budget_steps(budget: str, tokens_per_step: int, *, field: str = "budget") -> int:
    """Converts a budget to whole update steps, rounding tokens up.

    >>> budget_steps("200 steps", 4096), budget_steps("1M tokens", 4096)
    (200, 245)
    """
    match = _BUDGET.fullmatch(budget.strip())
    if match is None:
        raise UserError(f'{field}={budget!r} must read like "200 steps", "5M tokens" or "1.2B tokens"')
    number, scale, unit = match.groups()
    amount = float(number.replace("_", "")) * _SCALE[scale]
    require(math.isfinite(amount), f"{field}={budget!r} is too large")
    count = round(amount)
    steps = count if unit.startswith("step") else math.ceil(count / tokens_per_step)
    require(steps >= 1, f"{field}={budget!r} must be at least one step")
    return steps

"""Racks that grow while all their stacks are live: which stacks each stage holds, and what new ones are made from.

Stacks are numbered as in the finished rack, so that growing moves nothing: a smaller rack is a path that skips stacks.
"""

import dataclasses
import itertools

from stackwise_jax.errors import UserError
from stackwise_jax.models.growth import grown_places, sources
from stackwise_jax.schema import RunConfig

LATE_SHARES = (0.8, 0.2)  # of one expansion (Bu, 2025: about four fifths of the updates before it)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A rack on its way.

    Attributes:
      stacks: it consists of, from the left.
      grows: (new stack, the stack that it is made from); new stacks that are not among them are drawn.
    """

    stacks: tuple[int, ...]
    grows: tuple[tuple[int, int], ...]


def stages(config: RunConfig, n_stacks: int) -> tuple[Stage, ...]:
    """The racks of a growing run, the finished one of `n_stacks` last.

    Raises:
      UserError: sizes that do not rise to the number of stacks.
    """
    sizes, operator = _sizes(config.training.growth.sizes, n_stacks), config.training.growth.operator
    prepends = config.training.progressive.direction == "right_to_left"
    places = [tuple(range(n_stacks))]
    for small, large in reversed(list(itertools.pairwise(sizes))):
        kept = range(large - small, large) if prepends else grown_places(operator, small, large)
        places.insert(0, tuple(places[0][place] for place in kept))
    result = [Stage(places[0], ())]
    for (small, large), old, new in zip(itertools.pairwise(sizes), places, places[1:], strict=False):
        made_from = [None] * large if prepends else sources(operator, small, large)  # only drawn ones are prepended
        pairs = zip(new, made_from, strict=True)
        grows = tuple((stack, old[source]) for stack, source in pairs if stack not in old and source is not None)
        result.append(Stage(new, grows))
    return tuple(result)


def stage_ends(config: RunConfig, n_stages: int, total: int) -> list[int]:
    """How many of `total` updates are behind the rack at the end of every stage, each of which has one at least.

    Raises:
      UserError: shares that are not as many positive numbers as there are stages, or fewer updates than stages.
    """
    if total < n_stages:
        raise UserError(
            f"training.phase_budget={config.training.phase_budget!r} is {total} update(s) for {n_stages} racks on the "
            "way; give each one at least"
        )
    growth = config.training.growth
    shares = phase_shares(growth.shares, n_stages, "training.growth.shares")
    if not growth.shares and growth.sizes == "late" and n_stages == 2:
        shares = LATE_SHARES
    ends: list[int] = []
    for number, share in enumerate(itertools.accumulate(shares), start=1):
        earliest, latest = (ends[-1] if ends else 0) + 1, total - (n_stages - number)
        ends.append(min(max(round(total * share), earliest), latest))
    return ends


def phase_shares(text: str, n_phases: int, field: str) -> tuple[float, ...]:
    """What part of a budget each of several phases has, in turn; equal parts where no text says otherwise.

    >>> phase_shares("3,1", 2, "shares")
    (0.75, 0.25)

    Raises:
      UserError: the text is not as many positive numbers as there are phases.
    """
    try:
        shares = [float(share) for share in text.split(",")] if text else [1.0] * n_phases
    except ValueError:
        shares = []
    if len(shares) != n_phases or not all(1e-6 <= share <= 1e6 for share in shares):
        raise UserError(f'{field}={text!r} must be {n_phases} positive numbers, one a phase, such as "0.8,0.2"')
    return tuple(share / sum(shares) for share in shares)


def _sizes(text: str, n_stacks: int) -> tuple[int, ...]:
    """Stacks of each rack on the way."""
    if text == "":
        return tuple(range(1, n_stacks + 1))
    if text == "late":
        return (1, n_stacks) if n_stacks > 1 else (1,)
    if text == "doubling":
        doubled = itertools.takewhile(lambda size: size < n_stacks, (2**power for power in itertools.count()))
        return (*doubled, n_stacks)
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or sizes[0] < 1 or sizes[-1] != n_stacks or any(a >= b for a, b in itertools.pairwise(sizes)):
        raise UserError(
            f'training.growth.sizes={text!r} must be "", late, doubling or rising numbers of stacks that end in the '
            f'{n_stacks} of the rack, such as "1,{n_stacks}"'
        )
    return sizes

"""Early exit: a place that a head after some stack is sure of is not run through the stacks that follow.

Skipped stacks still owe later places keys and values. They are made from the state that the place left with, as CALM
does (Schuster et al., 2022): the place's state stays as it is, and stacks read it like any other. Where attention is
causal a place leaves by what lies before it alone, so one pass over whole rows gives what reading token after token
would.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Stage = Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]]
"""What one stack makes of the states of all places."""


class Scores(NamedTuple):
    """What a head says of every place.

    Attributes:
      loss: -log p(target), in nats.
      confidence: the largest probability.
      is_right: whether that is the target's.
    """

    loss: Float[Array, "B T"]
    confidence: Float[Array, "B T"]
    is_right: Bool[Array, "B T"]


class Left(NamedTuple):
    """Where every place left, and what was said of it there.

    Attributes:
      stage: number of the last stage that it was run through, from 0.
    """

    stage: Int[Array, "B T"]
    loss: Float[Array, "B T"]
    is_right: Bool[Array, "B T"]


Judge = Callable[[Float[Array, "B T D"]], Scores]
"""A head, read after a stage."""


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """FLOPs a token of each stage, forward.

    Attributes:
      whole: of its blocks.
      stored: of the keys and values alone, which a place that has left owes still.
      head: of judging once.
    """

    whole: tuple[float, ...]
    stored: tuple[float, ...]
    head: float


@dataclasses.dataclass(frozen=True)
class ExitFigures:
    """What exits at a confidence cost and save.

    Attributes:
      threshold: confidence from which a place leaves.
      loss: nats a place.
      accuracy: share of places whose likeliest token is the target.
      stages: that a place was run through, in the mean.
      block_share_saved: of the FLOPs of all blocks; what keys and values of skipped stacks take is not saved.
      share_saved: of the FLOPs of all blocks and one head, with every judgement counted; below 0 where judging costs
        more than is saved.
    """

    threshold: float
    loss: float
    accuracy: float
    stages: float
    block_share_saved: float
    share_saved: float


def leave_early(
    stages: Sequence[Stage], judges: Sequence[Judge], x: Float[Array, "B T D"], threshold: Float[Array, ""] | float
) -> Left:
    """Runs every place up to the first stage whose judge is at least `threshold` sure of it, or to the last.

    Args:
      x: states before the first stage.
      threshold: a probability; above 1: no place leaves early.
    """
    has_left = jnp.zeros(x.shape[:2], bool)
    stage, loss, is_right = jnp.zeros(x.shape[:2], jnp.int32), jnp.zeros(x.shape[:2]), has_left
    for number, (run, judge) in enumerate(zip(stages, judges, strict=True)):
        x = jnp.where(has_left[:, :, None], x, run(x))
        own = judge(x)
        leaves = ~has_left & ((own.confidence >= threshold) | (number == len(stages) - 1))
        stage = jnp.where(leaves, number, stage)
        loss, is_right = jnp.where(leaves, own.loss, loss), jnp.where(leaves, own.is_right, is_right)
        has_left |= leaves
    return Left(stage, loss, is_right)


def exit_figures(
    found: Iterable[tuple[Left, Bool[np.ndarray, "B T"]]], threshold: float, costs: StageCosts
) -> ExitFigures:
    """Sums up what `leave_early` said of batches.

    Args:
      found: of each batch, with the places that are asked for; where there are none at all every figure is NaN.
      costs: of each stage.
    """
    counts, loss, right = np.zeros(len(costs.whole)), 0.0, 0.0
    for left, asked in found:
        counts += np.bincount(np.asarray(left.stage)[asked], minlength=len(counts))
        loss += float(np.asarray(left.loss, np.float64)[asked].sum())
        right += float(np.asarray(left.is_right)[asked].sum())
    if (total := counts.sum()) == 0:
        return ExitFigures(threshold, *(float("nan"),) * 5)
    shares, whole, stored = counts / total, np.array(costs.whole), np.array(costs.stored)
    passed = np.cumsum(whole) + stored.sum() - np.cumsum(stored)  # of a place that leaves after each stage
    blocks = float(shares @ passed)
    judged = costs.head * float(shares @ np.arange(1, len(counts) + 1))
    return ExitFigures(
        threshold=threshold,
        loss=loss / float(total),
        accuracy=right / float(total),
        stages=float(shares @ np.arange(1, len(counts) + 1)),
        block_share_saved=1.0 - blocks / float(whole.sum()),
        share_saved=1.0 - (blocks + judged) / (float(whole.sum()) + costs.head),
    )

"""Sampling where depth is time: each band of noise is denoised by the stacks that were trained on it.

For the bands from the heaviest noise to the lightest: run that band's stacks until the masked share of each row is the
edge of the next band; a row whose share is lower already, as in infilling, begins at the band that holds it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Int

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.generate.denoise import RackDenoiser, count_ordinary
from stackwise_jax.generate.reveal import Denoiser, Rows, Rule, begin_rows, reveal_until
from stackwise_jax.models.stack import stack_size
from stackwise_jax.schema import ModelConfig, RunConfig
from stackwise_jax.train.curriculum import band_edges, band_stacks, is_depth
from stackwise_jax.train.phases import stack_sizes
from stackwise_jax.types import Keys, Params

FORMS = ("independent", "suffix", "prefix", "step_local")
# How the bands of a run can be read by the direction in which they were trained, the way they were trained first.
FORMS_OF = {"independent": ("independent",), "right_to_left": ("suffix", "step_local"), "left_to_right": ("prefix",)}
Edges = tuple[float, float]
"""(low, high) masked share of a band; equal for a level."""


@dataclasses.dataclass(frozen=True)
class Depth:
    """How a run lays noise out over depth.

    Attributes:
      bands: masked shares (low, high) of each band, leftmost stacks first.
      stacks: of each band, likewise: places in the rack's list.
      form: how bands are run; see `make_band_denoisers`.
      heads: tapped after each band, or None for the rack's; None: the rack's for all.
    """

    bands: tuple[Edges, ...]
    stacks: tuple[tuple[int, ...], ...]
    form: str
    heads: tuple[Params | None, ...] | None = None


def depth_of(
    config: RunConfig, rack: Params, tap: Callable[[int], Params | None], *, form: str | None = None
) -> Depth | None:
    """How a run lays noise out over depth; None where its time is not depth.

    Args:
      rack: of the run.
      tap: the head as it stood when the phase of a stack had ended; None where it is the rack's.
      form: how its bands are to be run; None: as they were trained.

    Raises:
      UserError: the run cannot be read so, or the rack has not all of its stacks.
    """
    if not is_depth(config):
        if form is not None:
            raise UserError(
                f"--form={form} is for runs whose time is depth, and this one has objective.time="
                f"{config.objective.time!r}; leave it out"
            )
        return None
    direction = config.training.progressive.direction
    forms = FORMS_OF[direction]
    if form not in (None, *forms):
        raise UserError(
            f"--form={form}: bands trained with training.progressive.direction={direction!r} can be run as: "
            + ", ".join(forms)
        )
    stacks = band_stacks(config)
    # A band's phase leaves its head under the last of its stacks, where the head lived on.
    heads = tuple(tap(own[-1]) for own in stacks)
    return Depth(band_edges(config), _places(rack, stack_sizes(config), stacks), form or forms[0], heads)


def _places(rack: Params, sizes: Sequence[int], stacks: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Where in the rack's list the stacks of each band are; reading may have made one of several.

    Args:
      sizes: blocks of each stack of the run.
      stacks: numbers of each band's.
    """
    ends = np.cumsum(sizes)
    place_of = [place for place, stack in enumerate(rack["stacks"]) for _ in range(stack_size(stack))]  # by block
    if len(place_of) < ends[-1]:
        raise UserError(
            f"{np.sum(ends <= len(place_of))} of {len(sizes)} stacks are there, and a run whose time is depth is read "
            "band by band through all of them; leave --stacks out, and let the run finish"
        )
    found = []
    for own in stacks:
        blocks = place_of[ends[own[0]] - sizes[own[0]] : ends[own[-1]]]
        found.append(tuple(range(blocks[0], blocks[-1] + 1)))
    if any(one[-1] >= other[0] for one, other in itertools.pairwise(found)):
        raise ValueError("a stack of this rack holds blocks of two bands")
    return tuple(found)


def make_band_denoisers(
    rack: Params,
    model: ModelConfig,
    stacks: Sequence[Sequence[int]],
    *,
    form: str,
    mask_id: int,
    pad_id: int,
    dtype: DTypeLike,
    shift: bool = False,
    heads: Sequence[Params | None] | None = None,
) -> tuple[RackDenoiser, ...]:
    """A denoiser for each band, in the order of `stacks`.

    Args:
      rack: the whole rack.
      stacks: of each band, leftmost first; numbers of the rack's stacks.
      form: independent (the band's stacks alone, from tokens), suffix (from the band's first stack to the last of the
        rack: trained right to left), prefix (from the first stack of the rack to the band's last: left to right), or
        step_local: the band's stacks alone, on the running state of suffix-trained bands, in which visible places hold
        E(token) and masked ones E([MASK]) at the embedding's root mean square. What a band has put out enters the
        next through the tokens that it revealed.
      heads: as in `Depth`.

    Raises:
      UserError: an unknown form.
    """
    if form not in FORMS:
        raise UserError(f"form={form!r} must be one of: {', '.join(FORMS)}.{did_you_mean(form, FORMS)}")
    denoisers = []
    for band, own in enumerate(stacks):
        first = 0 if form == "prefix" else min(own)
        last = len(rack["stacks"]) - 1 if form == "suffix" else max(own)
        parts = {**rack, "stacks": rack["stacks"][first : last + 1]}
        if heads is not None and heads[band] is not None:
            parts["head"] = heads[band]
        denoisers.append(
            RackDenoiser(parts, model, mask_id, pad_id, dtype, shift=shift, rescales_mask=form == "step_local")
        )
    return tuple(denoisers)


def denoise_by_depth(
    denoisers: Sequence[Denoiser],
    bands: Sequence[Edges],
    canvas: Int[np.ndarray, "B T"],
    *,
    keys: Keys,
    allowed: Bool[np.ndarray, "V"],
    rule: Rule,
    steps: int | None = None,
) -> tuple[Int[np.ndarray, "B T"], int]:
    """Fills every mask of a canvas, band by band, in one compiled program.

    Args:
      denoisers: of each band.
      bands: the masked shares (low, high) that each was trained on, in the same order, contiguous or levels. The run
        goes from the heaviest to the lightest, wherever they lie.
      canvas, keys, allowed, rule: as in `denoise`.
      steps: passes of a row that goes through all bands, divided among them evenly. None: one a mask.

    Returns:
      The filled canvas, and the network evaluations it took.

    Raises:
      UserError: fewer steps than bands.
    """
    if steps is not None and steps < len(bands):
        raise UserError(f"steps={steps} is too few for {len(bands)} bands of noise; each needs one at least")
    order = sorted(range(len(bands)), key=lambda band: -bands[band][1])
    edges = np.array([*(bands[band][1] for band in order[1:]), 0.0], np.float32)
    ordered = tuple(denoisers[band] for band in order)
    rows = _denoise_by_depth(ordered, edges, canvas, keys, allowed, steps, rule)
    return np.asarray(rows.tokens), int(rows.passes)


@functools.partial(jax.jit, static_argnames="rule")
def _denoise_by_depth(
    denoisers: tuple[Denoiser, ...],
    edges: Array,
    canvas: Int[Array, "B T"],
    keys: Keys,
    allowed: Bool[Array, "V"],
    steps: Int[Array, ""] | int | None,
    rule: Rule,
) -> Rows:
    free, ordinary = canvas == rule.mask_id, count_ordinary(canvas, allowed, rule)
    rows = begin_rows(canvas, keys)
    for band, denoiser in enumerate(denoisers):
        # A share of exactly the edge belongs to the next band; the slack is a float32's rounding.
        target = jnp.floor(edges[band] * ordinary * (1.0 + 1e-6)).astype(jnp.int32)
        if steps is None:
            own_steps = jnp.sum(free, axis=1)
        else:
            own_steps = jnp.broadcast_to(steps // len(denoisers) + (band < steps % len(denoisers)), ordinary.shape)
        rows = reveal_until(
            denoiser, rows, free, ordinary=ordinary, target=target, steps=own_steps, allowed=allowed, rule=rule
        )
    return rows

"""How live parameters move: one Optax transformation per part, and the schedule that every phase restarts.

Transformations carry the peak learning rate; the step multiplies their updates by the schedule's fraction, an
argument, so that phases of different length share one executable. A part's state is its own, so that it can be
dropped or kept alone.
"""

import dataclasses
import itertools
import math
import typing
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from stackwise_jax.models.weights import fixed_maps, is_fixed, is_matrix
from stackwise_jax.schema import ModelConfig, OptimizerConfig, RunConfig
from stackwise_jax.train.optimizer_state import KeptState, in_stream, kept, rounded_like, widened
from stackwise_jax.train.spectral import cap_spectral_norm
from stackwise_jax.types import AnyArray, Params

Transforms = dict[str, optax.GradientTransformation]
"""One transformation for each kind of part: "embedding", "head", and the lists "stacks" and "adapters", of which each
entry is moved on its own."""

# Stream of the run's key that stochastic rounding draws from (train/step.py and models/rack.py use lower ones).
ROUNDING_STREAM = 16


def make_transforms(config: RunConfig, *, scales_head: bool) -> Transforms:
    """Builds the transformations.

    Args:
      scales_head: apply `head_learning_rate_scale`, which holds once the embedding is settled.
    """
    own, stability = config.optimizer, config.model.stability
    head_rate = own.learning_rate * (own.head_learning_rate_scale if scales_head else 1.0)
    adapter_rate = own.learning_rate * config.training.adapters.learning_rate_scale
    stacks = _muon(own) if own.name == "muon" else _adamw(own, own.learning_rate, leading=1)
    if stability.spectral_norm is not None:
        stacks = optax.chain(stacks, optax.masked(cap_spectral_norm(stability.spectral_norm), _is_matrix(leading=1)))
    if fixed_maps(config.model):
        stacks = _without_fixed(stacks, config.model)
    embedding = _adamw(own, own.learning_rate, leading=0)
    if config.model.fixed_table:
        embedding = _without_fixed(embedding, config.model)
    transforms = {
        "embedding": (embedding, 0),
        "stacks": (stacks, 1),
        "adapters": (_adamw(dataclasses.replace(own, weight_decay=0.0), adapter_rate, leading=1), 1),
        "head": (_adamw(own, head_rate, leading=0), 0),
    }
    return {name: _as_stored(config, name, *transform) for name, transform in transforms.items()}


def _without_fixed(transform: optax.GradientTransformation, model: ModelConfig) -> optax.GradientTransformation:
    """Of a stack or the embedding, with neither state nor update for what stays as it was drawn or given."""
    # Adding -0.0 changes no number, -0.0 itself included, which 0.0 would.
    stay = optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.0), updates))
    return optax.partition(
        {"fixed": stay, "moved": transform},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "fixed" if is_fixed(path, model) else "moved", params
        ),
    )


def _as_stored(
    config: RunConfig, name: str, transform: optax.GradientTransformation, leading: int
) -> optax.GradientTransformation:
    """A part's transformation with its state as `precision` asks; as it is where nothing is rounded."""
    precision = config.precision
    if precision.optimizer == "fp32" and (precision.weights == "fp32" or name != "stacks"):
        return transform
    stream = jax.random.fold_in(jax.random.key(config.seed), ROUNDING_STREAM)
    key = jax.random.fold_in(stream, zlib.crc32(name.encode()))
    return kept(transform, precision.optimizer, key=key, leading=leading)


def _is_matrix(leading: int) -> Any:
    """A mask for Optax: arrays of matrices. Norms, biases and routers are not among them."""
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: is_matrix(path, leaf.ndim - leading), params
    )


def _adamw(config: OptimizerConfig, learning_rate: float, leading: int) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=_is_matrix(leading),
    )


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon for the matrices of a stack, each block's and each expert's on its own; AdamW for the rest."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    muon = optax.contrib.muon(
        config.muon_learning_rate,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: matrix, tree),
    )
    return optax.partition(
        {"matrix": muon, "rest": _adamw(config, config.learning_rate, leading=1)},
        lambda params: jax.tree.map(lambda found: "matrix" if found else "rest", _is_matrix(leading=1)(params)),
    )


def init_part(transforms: Transforms, name: str, params: Any) -> Any:
    """Fresh optimiser state of one part; of a list (of stacks), a list of states."""
    if isinstance(params, list):
        return [in_stream(transforms[name].init(entry), index) for index, entry in enumerate(params)]
    return transforms[name].init(params)


def update_part(
    transform: optax.GradientTransformation,
    gradients: Params,
    state: Any,
    params: Params,
    fraction: Float[AnyArray, ""],
) -> tuple[Params, Any]:
    """One update of one part, in float32. Returns (parameters in the dtypes they had, state), both new."""
    if isinstance(state, KeptState):
        # Apart from what the forward pass reads: fp8 matmuls read weights transposed, and a conversion that both shared
        # would have the whole update computed that way round, and copied back.
        params = jax.lax.optimization_barrier(params)
    wide = widened(params)
    updates, state = transform.update(widened(gradients), state, wide)
    updates = jax.tree.map(lambda leaf: leaf * fraction.astype(leaf.dtype), updates)
    return rounded_like(typing.cast(Params, optax.apply_updates(wide, updates)), params, state), state


def update_parts(
    transforms: Transforms, gradients: Params, states: Params, params: Params, fractions: Float[AnyArray, "P"]
) -> tuple[Params, Params]:
    """One update of every live part.

    Args:
      fractions: of the learning rate, one for each part: kinds in alphabetical order, lists entry by entry.
    """
    new_params: Params = {}
    new_states: Params = {}
    number = itertools.count()
    for name in sorted(params):
        part, transform = params[name], transforms[name]
        if isinstance(part, list):
            pairs = [
                update_part(transform, *entry, fractions[next(number)])
                for entry in zip(gradients[name], states[name], part, strict=True)
            ]
            new_params[name], new_states[name] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        else:
            updated = update_part(transform, gradients[name], states[name], part, fractions[next(number)])
            new_params[name], new_states[name] = updated
    return new_params, new_states


def gradient_norm(gradients: Params) -> Float[Array, ""]:
    """Global norm, summed in float32 whatever the gradients are stored as."""
    return optax.tree.norm(widened(gradients))


def scaled(gradients: Params, factor: Float[Array, ""]) -> Params:
    """Gradients times a float32 factor, in their own dtypes."""
    return jax.tree.map(lambda leaf: (leaf.astype(jnp.float32) * factor).astype(leaf.dtype), gradients)


def clip_scale(norm: Float[Array, ""], clip_norm: float) -> Float[Array, ""]:
    """What gradients are multiplied by so that their global norm is at most `clip_norm` (0: no clip)."""
    if clip_norm == 0.0:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))


def schedule_fraction(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (from 0) of a phase of `steps`, as a fraction of its peak.

    Linear warm-up, then WSD (stable, then linear decay; Hu et al., 2024) or cosine, down to `final_fraction`.
    """
    warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        decay = math.ceil(config.decay_fraction * steps)
        shape = min(1.0, (steps - step) / (decay + 1))
    return config.final_fraction + (1.0 - config.final_fraction) * shape

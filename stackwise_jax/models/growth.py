"""Growth of a rack from n to m stacks: where the old ones lie, and what a new one and its moments are made of.

    random       old stacks first, new ones drawn (Bu, 2025)
    copy         the whole list again, place i from stack i mod n (G_stack; Du et al., 2024)
    interleave   each stack repeated, place i from stack floor(i n / m) (Bu, 2025)
    zero_output  as interleave, but new stacks add nothing yet: the function is kept (LLaMA Pro; Wu et al., 2024)

Everything is a function of numbers or of the tree of one stack.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Params

OPERATORS = ("random", "copy", "interleave", "zero_output")

# The maps whose outputs a block adds to the residual stream.
_RESIDUAL_MAPS = (("attention", "output"), ("mlp", "down"), ("experts", "down"), ("shared", "down"))


def sources(operator: str, n: int, m: int) -> tuple[int | None, ...]:
    """The old stack that each of the m places is filled from; None where a stack is drawn.

    >>> sources("copy", 2, 4), sources("interleave", 2, 4), sources("random", 2, 4)
    ((0, 1, 0, 1), (0, 0, 1, 1), (0, 1, None, None))

    Raises:
      UserError: an unknown operator.
      ValueError: the rack would shrink, or there is nothing to copy.
    """
    _check(operator)
    if not (0 if operator == "random" else 1) <= n <= m:
        raise ValueError(f"a rack of {n} stacks does not grow to {m} by operator {operator!r}")
    if operator == "random":
        return (*range(n), *[None] * (m - n))
    return tuple(i % n if operator == "copy" else i * n // m for i in range(m))


def grown_places(operator: str, n: int, m: int) -> tuple[int, ...]:
    """Where the n old stacks lie among the m, in their order: each at the first place that is filled from it.

    >>> grown_places("copy", 2, 4), grown_places("interleave", 2, 4)
    ((0, 1), (0, 2))

    Raises: as `sources`.
    """
    filled = sources(operator, n, m)
    return tuple(filled.index(old) for old in range(n))


def grow(stack: Params, operator: str, model: ModelConfig) -> Params:
    """A new stack made of its source: a copy, of zero_output with zeros for the maps onto the residual stream.

    Zeros leave x + 0 of every block of a pre-norm rack. Only these maps take a gradient at first, the rest of the block
    once they have moved. That is reported to learn worse than plain copies (Bu, 2025).

    Args:
      stack: parameters of the source, of any dtype. No array is shared with it, so that both can be donated.

    Raises:
      UserError: an unknown operator, or zero_output in a post-norm rack, whose norms change what they are given.
      ValueError: random, which draws its stacks (`models.rack.init_rack_stack`).
    """
    _check_has_source(operator)
    if operator != "zero_output":
        return jax.tree.map(jnp.copy, stack)
    if model.norm_position != "pre":
        raise UserError(
            f"training.growth.operator='zero_output' needs model.norm_position='pre', not {model.norm_position!r}: the "
            "norm after a sum changes it even where nothing is added; choose random, copy or interleave"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if _is_residual_map(path) else jnp.copy(leaf), stack
    )


def grow_moments(state: Any, operator: str) -> Any:
    """The optimiser state of a new stack, made of its source's: a copy, step count included.

    Staged training grows moments by the operator that grows the weights, so that the rate at which the loss falls is
    kept too (Shen et al., 2022). Of zero_output the mean gradient ("mu" in Optax) of what was zeroed becomes zero, as
    it is that of another weight; the mean square ("nu") is kept, because the count is: beside a count that has left
    bias correction behind, a mean square that begins at zero makes a first update of (1 - b1) / sqrt(1 - b2) times the
    learning rate, 3.2 at b2 = 0.999, and larger ones after it.

    Args:
      state: of one stack, of any Optax transformation, in storage of any precision. Random bits are copied with it:
        give the state a stream of its own with `train.optimizer_state.in_stream`.

    Raises:
      UserError: an unknown operator.
      ValueError: random, whose stacks begin with a fresh state (`train.optimizer.init_part`).
    """
    _check_has_source(operator)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if _forgets(operator, path) else jnp.copy(leaf), state
    )


def _check(operator: str) -> None:
    if operator not in OPERATORS:
        names = ", ".join(OPERATORS)
        hint = did_you_mean(operator, OPERATORS)
        raise UserError(f"training.growth.operator={operator!r} must be one of: {names}.{hint}")


def _check_has_source(operator: str) -> None:
    _check(operator)
    if operator == "random":
        raise ValueError("operator 'random' makes new stacks of no other; draw them")


def _forgets(operator: str, path: tuple[Any, ...]) -> bool:
    fields = [part.name for part in path if isinstance(part, jax.tree_util.GetAttrKey)]
    return operator == "zero_output" and "mu" in fields and _is_residual_map(path)


def _is_residual_map(path: tuple[Any, ...]) -> bool:
    names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
    return any(pair in _RESIDUAL_MAPS for pair in itertools.pairwise(names))

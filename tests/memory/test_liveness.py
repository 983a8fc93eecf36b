"""The memory of programs that are small enough to be counted by hand."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.memory import liveness
from stackwise_jax.memory.liveness import packed_bytes, peak_memory
from stackwise_jax.models import families
from stackwise_jax.models.block import Context
from stackwise_jax.models.stack import apply_penalised_stack, init_stack
from stackwise_jax.ops.mask import Mask
from stackwise_jax.ops.target import HOPPER, planned_for
from stackwise_jax.schema import ModelConfig

ROWS, WIDTH, HIDDEN = 512, 256, 1024
X, UP, DOWN = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is counted on top."""
    monkeypatch.setattr(liveness, "_MARGIN", 1.0)


def temporary(function: Callable[..., Any], *shapes: Any, donated: int = 0, balance: float = 20.0) -> int:
    closed = jax.make_jaxpr(function)(*shapes)
    return peak_memory(closed, ["a"] * len(shapes), flops_per_byte=balance, donated=donated, workspace=0).temporary


def test_what_stands_between_matmuls_is_stored_once() -> None:
    def run(x: Any, up: Any, down: Any) -> Any:
        hidden = x @ up
        return (jnp.abs(hidden) * 2 + 1) @ down

    hidden, out = 2 * ROWS * HIDDEN, 2 * ROWS * WIDTH
    assert temporary(run, X, UP, DOWN) == max(2 * hidden, hidden + out)  # the chain in between is one kernel


def test_a_conversion_is_computed_where_it_is_read() -> None:
    def run(x: Any) -> Any:
        wide = x.astype(jnp.float32)
        mean = wide.mean(axis=1, keepdims=True)
        return (wide - mean).astype(x.dtype)

    assert temporary(run, X) == 2 * ROWS * WIDTH + 4 * ROWS


def test_what_costs_more_to_compute_again_than_to_read_is_stored() -> None:
    def run(x: Any) -> Any:
        value = jnp.exp(x.astype(jnp.float32))
        return (value - value.mean(axis=1, keepdims=True)).astype(x.dtype)

    result, means, value = 2 * ROWS * WIDTH, 4 * ROWS, 4 * ROWS * WIDTH
    # 3 * 4 - 2 bytes a number are saved where it is computed twice.
    assert temporary(run, X, balance=9.0) == value + result + means
    assert temporary(run, X, balance=12.0) == result + means  # on a device whose memory is slower, beside


def test_a_sum_that_many_read_is_stored() -> None:
    def run(*terms: Any) -> Any:
        whole = sum(terms[1:], start=terms[0])
        return (whole - whole.mean(axis=1, keepdims=True)).astype(terms[0].dtype)

    result, means = 2 * ROWS * WIDTH, 4 * ROWS
    assert temporary(run, X, X, X, X) == 2 * result + means  # twice four arrays are more than it three times
    assert temporary(run, X, X) == result + means


def test_results_lie_in_arguments_that_were_given_up() -> None:
    def update(weights: Any, gradient: Any) -> Any:
        return (weights - 0.1 * gradient).astype(weights.dtype)

    assert temporary(update, X, X, donated=1) == 0
    assert temporary(update, X, X) == 2 * ROWS * WIDTH


def test_a_matmul_adds_to_what_it_is_added_to() -> None:
    def run(x: Any, up: Any, down: Any) -> Any:
        return x + (x @ up) @ down

    assert temporary(run, X, UP, DOWN) == 2 * ROWS * (HIDDEN + WIDTH)


def test_a_loop_takes_a_turn_and_what_it_collects() -> None:
    def run(x: Any, up: Any, down: Any) -> Any:
        def turn(carry: Any, _: Any) -> Any:
            return (carry @ up) @ down, carry.sum(axis=1)

        return jax.lax.scan(turn, x, None, length=7)

    carried, collected, hidden = 2 * ROWS * WIDTH, 7 * 2 * ROWS, 2 * ROWS * HIDDEN
    count = temporary(run, X, UP, DOWN)
    assert carried + collected + hidden <= count <= 2 * carried + collected + hidden + 2 * ROWS


def test_equal_constants_are_made_where_the_first_is_needed() -> None:
    def run(x: Any, up: Any, down: Any, *, shape: tuple[int, int]) -> Any:
        def turn(carry: Any, _: Any) -> Any:
            return carry + (x @ up) @ down, None

        summed, _ = jax.lax.scan(turn, jnp.zeros((ROWS, WIDTH), x.dtype), None, length=7)
        return jnp.zeros(shape, x.dtype).at[0].add(summed.reshape(shape)[1])

    equal, unlike = (
        temporary(functools.partial(run, shape=shape), X, UP, DOWN) for shape in ((ROWS, WIDTH), (WIDTH, ROWS))
    )
    assert equal - unlike == 2 * ROWS * WIDTH  # beside the loop, where most is alive


def test_pieces_share_a_buffer() -> None:
    assert packed_bytes([(512, 0, 1), (256, 2, 3), (256, 2, 3)]) == 512
    assert packed_bytes([(512, 0, 2), (256, 2, 3)]) == 768
    # Never more than 768 bytes live at once, and the largest, which goes first, leaves a gap that is too small.
    assert packed_bytes([(512, 0, 0), (256, 0, 2), (512, 1, 2)]) == 768
    assert packed_bytes([(100, 0, 0)]) == 256  # aligned
    assert packed_bytes([]) == 0


MODEL = resolve({"model": families.llama("tiny")}).model


def step_memory(
    blocks: int, remat: str, model: ModelConfig = MODEL, known: Sequence[dict[str, bool]] = ()
) -> tuple[int, int]:
    """(temporary bytes of a step of so many blocks of bf16, bytes that its backward pass is handed)."""
    B, T = 8, 256
    positions = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = jax.eval_shape(lambda: init_stack(jax.random.key(0), model, 0, blocks))
    x = jax.ShapeDtypeStruct((B, T, model.d_model), jnp.bfloat16)

    def loss(params: Any, x: Any, positions: Any) -> Any:
        context, how = Context(positions, Mask("causal", None, None, None)), {"remat": remat, "unroll": blocks}
        out, _ = apply_penalised_stack(params, x, context, model, dtype=jnp.bfloat16, known=known, **how)
        return out.astype(jnp.float32).sum()

    with planned_for(HOPPER):
        closed = jax.make_jaxpr(jax.grad(loss))(params, x, positions)
        pull = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], params, x, positions)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    count = peak_memory(closed, ["a"] * len(closed.jaxpr.invars), flops_per_byte=20.0, workspace=0).temporary
    return count, kept


def test_another_block_costs_what_its_backward_pass_is_handed() -> None:
    """An independent count: the arrays in the closure that `jax.vjp` returns."""
    (two, kept_two), (three, kept_three) = step_memory(2, "none"), step_memory(3, "none")
    assert three - two == pytest.approx(kept_three - kept_two, rel=0.06)
    full = step_memory(3, "full")[0] - step_memory(2, "full")[0]
    assert full < 0.5 * (three - two)  # the twin: what is computed anew is not there to be handed on


@pytest.mark.parametrize("remat", ["none", "full"])
def test_blocks_apart_take_what_an_unrolled_loop_takes(remat: str) -> None:
    """Facts that are known make a Python loop of what else is a scan."""
    model = dataclasses.replace(MODEL, first_attention_norm=False)
    scanned, apart, more = (
        step_memory(blocks, remat, model, [{"is_first": False}] * known)[0]
        for blocks, known in ((4, 0), (4, 4), (5, 5))
    )
    assert apart == pytest.approx(scanned, rel=0.03)
    assert more > 1.06 * scanned  # the twin

"""The memory of programs that are small enough to be counted by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.memory import fusion, liveness
from stackwise_jax.memory.liveness import packed_bytes, peak_memory
from stackwise_jax.models import families
from stackwise_jax.models.block import Context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.ops.mask import Mask
from stackwise_jax.ops.target import planned_for

ROWS, WIDTH, HIDDEN = 512, 256, 1024
X, UP, DOWN = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, WIDTH), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is counted on top."""
    monkeypatch.setattr(liveness, "_MARGIN", 1.0)


def temporary(function: Callable[..., Any], *shapes: Any, donated: int = 0) -> int:
    closed = jax.make_jaxpr(function)(*shapes)
    return peak_memory(closed, ["a"] * len(shapes), donated=donated, workspace=0).temporary


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


def test_a_sum_that_is_read_again_and_again_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Any, y: Any) -> Any:
        both = x + y
        return (both - both.mean(axis=1, keepdims=True)).astype(x.dtype)

    result, means = 2 * ROWS * WIDTH, 4 * ROWS
    assert temporary(run, X, X) == 2 * result + means
    monkeypatch.setattr(fusion, "_WORTH_STORING", 10.0)
    assert temporary(run, X, X) == result + means  # the twin: computed twice, from both


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


def test_pieces_share_a_buffer() -> None:
    assert packed_bytes([(512, 0, 1), (256, 2, 3), (256, 2, 3)]) == 512
    assert packed_bytes([(512, 0, 2), (256, 2, 3)]) == 768
    # Never more than 768 bytes live at once, and the largest, which goes first, leaves a gap that is too small.
    assert packed_bytes([(512, 0, 0), (256, 0, 2), (512, 1, 2)]) == 768
    assert packed_bytes([(100, 0, 0)]) == 256  # aligned
    assert packed_bytes([]) == 0


MODEL = resolve({"model": families.llama("tiny")}).model


def step_memory(blocks: int, remat: str) -> tuple[int, int]:
    """(temporary bytes of a step of so many blocks of bf16, bytes that its backward pass is handed)."""
    B, T = 8, 256
    positions = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = jax.eval_shape(lambda: init_stack(jax.random.key(0), MODEL, 0, blocks))
    x = jax.ShapeDtypeStruct((B, T, MODEL.d_model), jnp.bfloat16)

    def loss(params: Any, x: Any, positions: Any) -> Any:
        context = Context(positions, Mask("causal", None, None, None))
        out = apply_stack(params, x, context, MODEL, dtype=jnp.bfloat16, remat=remat, unroll=blocks)
        return out.astype(jnp.float32).sum()

    with planned_for((9, 0)):
        closed = jax.make_jaxpr(jax.grad(loss))(params, x, positions)
        pull = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], params, x, positions)
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    count = peak_memory(closed, ["a"] * len(closed.jaxpr.invars), workspace=0).temporary
    return count, kept


def test_another_block_costs_what_its_backward_pass_is_handed() -> None:
    """An independent count: the arrays in the closure that `jax.vjp` returns."""
    (two, kept_two), (three, kept_three) = step_memory(2, "none"), step_memory(3, "none")
    assert three - two == pytest.approx(kept_three - kept_two, rel=0.06)
    full = step_memory(3, "full")[0] - step_memory(2, "full")[0]
    assert full < 0.5 * (three - two)  # the twin: what is computed anew is not there to be handed on

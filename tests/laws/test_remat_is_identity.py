"""What the backward pass keeps changes memory and never a number."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models import stack as stack_lib
from stackwise_jax.models.rack import row_context
from stackwise_jax.models.stack import apply_stack, init_stack
from stackwise_jax.types import Params

B, T, D, L = 2, 16, 32, 2
MODEL = resolve(
    {
        "model": {"vocab_size": 64, "d_model": D, "n_heads": 4, "d_ff": 48, "init_std": 0.2, "dropout": 0.2},
        "data": {"seq_len": T},
    }
).model
Loss = Callable[[Params, Any], Any]


def loss_of(remat: str) -> Loss:
    context = row_context(MODEL, jnp.ones((B, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))
    key = jax.random.key(9)

    def loss(params: Params, x: Any) -> Any:
        return jnp.sum(jnp.square(apply_stack(params, x, context, MODEL, dtype=jnp.float32, remat=remat, key=key)))

    return loss


@pytest.fixture(scope="module")
def arguments() -> tuple[Params, Any]:
    return init_stack(jax.random.key(0), MODEL, 0, L), jax.random.normal(jax.random.key(5), (B, T, D))


def numbers(remat: str, arguments: tuple[Params, Any]) -> list[np.ndarray]:
    """The loss and its gradients in weights and input."""
    result = jax.jit(jax.value_and_grad(loss_of(remat), argnums=(0, 1)))(*arguments)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


@pytest.fixture(scope="module")
def plain(arguments: tuple[Params, Any]) -> list[np.ndarray]:
    return numbers("none", arguments)


def equal(ours: list[np.ndarray], plain: list[np.ndarray]) -> bool:
    return all(np.allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_is_identity(remat: str, arguments: tuple[Params, Any], plain: list[np.ndarray]):
    assert equal(numbers(remat, arguments), plain)


def test_remat_is_identity_detects_a_body_that_loses_gradient(
    arguments: tuple[Params, Any], plain: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    def wrong(body: Any, without_loop: bool) -> Any:
        def lossy(hidden: Any, of_block: Any) -> Any:
            return body(jax.lax.stop_gradient(hidden), of_block)[0], None

        return jax.checkpoint(lossy)

    monkeypatch.setitem(stack_lib.REMAT, "full", wrong)
    ours = numbers("full", arguments)
    assert np.allclose(ours[0], plain[0])  # the loss alone would not notice
    assert not equal(ours, plain)


def test_remat_is_identity_detects_fresh_dropout_in_the_second_pass(
    arguments: tuple[Params, Any], plain: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    def wrong(body: Any, without_loop: bool) -> Any:
        def other_key(hidden: Any, of_block: Any) -> Any:
            params, key = of_block
            return body(hidden, (params, jax.random.fold_in(key, 1)))

        @jax.custom_vjp
        def forward(hidden: Any, of_block: Any) -> Any:
            return body(hidden, of_block)

        def keep(hidden: Any, of_block: Any) -> Any:
            return body(hidden, of_block), (hidden, of_block)

        def pull(kept: Any, cotangent: Any) -> Any:
            hidden, (params, key) = kept
            output = jax.vjp(lambda h, p: other_key(h, (p, key))[0], hidden, params)[1](cotangent[0])
            return output[0], (output[1], np.zeros(key.shape, jax.dtypes.float0))

        forward.defvjp(keep, pull)
        return forward

    monkeypatch.setitem(stack_lib.REMAT, "full", wrong)
    assert not equal(numbers("full", arguments), plain)


def test_full_keeps_less_than_dots_than_none(arguments: tuple[Params, Any]):
    """Counts what is stored between the passes, so that an option that does nothing shows."""

    def stored(remat: str) -> int:
        pull = jax.eval_shape(lambda *a: jax.vjp(loss_of(remat), *a)[1], *arguments)
        return sum(leaf.size for leaf in jax.tree.leaves(pull))

    assert stored("full") < stored("dots") < stored("none")


def matmuls(remat: str, arguments: tuple[Params, Any]) -> int:
    """Matmuls of the compiled gradient of a stack without a loop."""
    context = row_context(MODEL, None, jnp.arange(T, dtype=jnp.int32)[None].repeat(B, 0))

    def loss(params: Params, x: Any) -> Any:
        return jnp.sum(apply_stack(params, x, context, MODEL, dtype=jnp.float32, remat=remat, unroll=L))

    lowered = jax.jit(jax.grad(loss)).lower(*arguments)
    return lowered.compile({"xla_backend_optimization_level": 3}).as_text().count(" dot(")


def test_remat_survives_the_compiler(arguments: tuple[Params, Any], monkeypatch: pytest.MonkeyPatch):
    plain, dots, full = (matmuls(remat, arguments) for remat in ("none", "dots", "full"))
    assert full > dots > plain
    monkeypatch.setitem(stack_lib.REMAT, "full", lambda body, _: jax.checkpoint(body, prevent_cse=False))
    assert matmuls("full", arguments) < dots  # the twin: most of the second pass is found in the first, and kept

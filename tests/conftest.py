"""Settings that every test runs under: CPU, fast compiles, no silent broadcasting, shapes checked at every call."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("STACKWISE_TEST_PLATFORM", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":  # halves a suite that mostly compiles
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("stackwise_jax", "beartype.beartype")

# One table of tolerances by dtype for comparisons that cannot be bitwise; tests use it and never loosen it.
TOLERANCE = {"float32": {"rtol": 2e-5, "atol": 2e-6}, "bfloat16": {"rtol": 2e-2, "atol": 2e-2}}


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def tolerance() -> dict[str, dict[str, float]]:
    return TOLERANCE

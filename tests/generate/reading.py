"""What the tests of masked samplers share: a tiny random rack, recording denoisers, and the law of a filled canvas."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax.generate.denoise import RackDenoiser
from stackwise_jax.models.rack import init_rack
from stackwise_jax.schema import ArchitectureConfig, ModelConfig
from stackwise_jax.types import Params

VOCAB, PAD, MASK = 19, 0, 18
ALLOWED = (np.arange(VOCAB) != PAD) & (np.arange(VOCAB) < 16)  # 16 and 17 may be given, not drawn
MODEL = ModelConfig(
    vocab_size=VOCAB,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_ff=24,
    max_positions=16,
    init_std=0.4,
    attention="bidirectional",
    architecture=ArchitectureConfig(n_stacks=3, blocks_per_stack=1),
)


@functools.cache
def rack_of(model: ModelConfig) -> Params:
    return jax.jit(init_rack, static_argnums=(1, 2))(jax.random.key(3), model, (1, 1, 1))


@functools.cache
def rack_denoiser(**options: Any) -> RackDenoiser:
    return RackDenoiser(rack_of(MODEL), MODEL, MASK, PAD, jnp.float32, **options)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Told:
    """A denoiser of given logits [T V] that tells `record` what it is called with."""

    logits: jax.Array
    record: Callable[[np.ndarray, np.ndarray], None] = dataclasses.field(metadata={"static": True})

    def __call__(self, tokens: jax.Array, rate: jax.Array) -> jax.Array:
        jax.debug.callback(self.record, tokens, rate, ordered=True)
        return jnp.broadcast_to(self.logits[None, : tokens.shape[1]], (*tokens.shape, self.logits.shape[1]))


def check_filled(canvas: np.ndarray, filled: np.ndarray) -> None:
    """Given tokens and padding are what they were; every mask has become an id that may be drawn."""
    masked = canvas == MASK
    np.testing.assert_array_equal(filled[~masked], canvas[~masked])
    assert ALLOWED[filled[masked]].all()

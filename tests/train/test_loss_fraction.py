"""Training on the loss of one place in n."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.bench.live_step import random_batch
from stackwise_jax.errors import UserError
from stackwise_jax.models.rack import init_rack
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.phases import signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.step import make_gradients
from stackwise_jax.types import Vocabulary


@pytest.fixture(scope="module")
def parts() -> Any:
    entries = config_lib.default()
    entries.model.update({"vocab_size": 32, "d_model": 16, "n_heads": 2, "d_ff": 32})
    entries.model.architecture.n_stacks = 1
    entries.data.update({"seq_len": 12, "isolate_documents": False})
    entries.training.update({"mode": "end_to_end", "batch_size": 4, "loss_fraction": 0.25})
    config = config_lib.resolve(entries)
    (phase,) = make_curriculum(config)
    program = Program(config, Vocabulary(32, 0, ()), 4)
    gradients = jax.jit(make_gradients(program, signature(phase, phase.main, (phase,), config)))
    live = init_rack(jax.random.key(0), config.model, (1,))
    batch = dataclasses.replace(random_batch(config), row_ids=np.arange(4, dtype=np.int32))
    return program, lambda offset: gradients(live, {}, batch, None, None, offset)


def test_the_mean_over_offsets_is_the_whole(parts: Any):
    """Loss and gradients of four offsets add up to four times those of every place; one alone does not."""
    _, gradients = parts
    whole = gradients(None)
    each = [gradients(jnp.int32(offset)) for offset in range(4)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *[own[:2] for own in each])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), mean, whole[:2])
    assert all(float(own[2]) == float(whole[2]) for own in each)
    assert abs(float(each[0][1]) - float(whole[1])) > 1e-3 * float(whole[1])  # twin


def test_offsets_are_drawn_from_all_and_follow_from_the_step(parts: Any):
    program, _ = parts
    offsets = [int(program.loss_offset(jnp.int32(step))) for step in range(40)]
    assert set(offsets) == {0, 1, 2, 3}
    assert offsets == [int(program.loss_offset(jnp.int32(step))) for step in range(40)]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.5, 0.2])
def test_a_share_that_is_no_whole_part_of_a_row_is_refused(share: float):
    entries = config_lib.default()
    entries.data.seq_len = 12
    entries.training.loss_fraction = share
    with pytest.raises(UserError, match=r"training\.loss_fraction"):
        config_lib.resolve(entries)

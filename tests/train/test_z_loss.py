"""The z-loss counts in what is trained, fused or chained, and in no evaluation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.models.rack import apply_rack, init_rack
from stackwise_jax.objectives.objective import Task
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import ChainedGradients, make_chained_evaluation
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.step import make_evaluation, make_gradients
from stackwise_jax.types import Batch, Vocabulary

LIVE = Role.LIVE
SIGNATURE = Signature(False, ((1, LIVE),), LIVE, LIVE, True, "fused", Task("clm", "causal"))


@pytest.mark.parametrize("execution", ["fused", "chained"])
def test_training_counts_it_and_evaluation_does_not(execution: str, tiny: Any):
    config = tiny(model__architecture__n_stacks=1, model__stability__z_loss=0.1)
    program = Program(config, Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8)
    rack, frozen = init_rack(jax.random.key(3), config.model, (1,)), {"frozen_stacks": []}
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 5, 320)
    ones, places = jnp.ones((4, 32), jnp.int32), jnp.broadcast_to(jnp.arange(32)[None], (4, 32))
    batch = Batch(tokens, ones, places, jnp.arange(4), jnp.zeros(4, int))
    chained, fused = ChainedGradients(ChainPrograms(program), SIGNATURE), jax.jit(make_gradients(program, SIGNATURE))
    gradients = chained if execution == "chained" else fused
    _, trained, weight = gradients(rack, frozen, batch, None, None)
    evaluations = {"fused": (make_evaluation, program), "chained": (make_chained_evaluation, ChainPrograms(program))}
    make, programs = evaluations[execution]
    measured, same_weight = make(programs, SIGNATURE)(rack, frozen, batch, None)

    example = program.corrupt(program.task, batch)
    hidden = apply_rack(
        rack, example.inputs, program.context(program.task, example, {}), config.model, dtype=jnp.float32
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(rack["head"]["table"], np.float64).T
    z = 0.1 * np.sum(np.asarray(example.weights) * np.log(np.exp(logits).sum(axis=-1)) ** 2)
    assert float(weight) == float(same_weight)
    assert float(trained) - float(measured) == pytest.approx(z, rel=1e-4)
    assert z > 0.1 * float(measured)

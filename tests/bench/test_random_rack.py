"""A random rack is what a run of its config and seed would store, merged or not."""

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax import config as config_lib
from stackwise_jax.bench.random_rack import block_bytes, random_rack
from stackwise_jax.memory.precision import to_storage
from stackwise_jax.models.rack import init_rack
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.phases import stack_sizes


def config_of(precision: str) -> RunConfig:
    entries = config_lib.default()
    entries.model.update({"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "vocab_size": 32})
    entries.model.architecture.update({"n_stacks": 2, "blocks_per_stack": 1})
    entries.precision.trunk = precision
    return config_lib.resolve(entries)


def test_it_is_the_rack_that_a_run_begins_with():
    config = config_of("nvfp4")
    drawn = init_rack(jax.random.key(config.seed), config.model, stack_sizes(config))
    drawn["stacks"] = [to_storage(stack, "nvfp4") for stack in drawn["stacks"]]
    apart, merged = random_rack(config, merged=False), random_rack(config)
    jax.tree.map(np.testing.assert_array_equal, apart, drawn)
    joined = [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *drawn["stacks"])]
    jax.tree.map(np.testing.assert_array_equal, merged, {**drawn, "stacks": joined})
    # 4.5 bits a weight, since matrices of 64 x 64 and the like fill their blocks; two norms, seven matrices' scales.
    matrices = 64 * (64 + 2 * 32 + 64 + 3 * 96)
    assert block_bytes(merged) == block_bytes(apart) == 2 * (matrices * 9 // 16 + 4 * (2 * 64 + 7))

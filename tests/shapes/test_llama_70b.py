"""The 70B config by shapes alone: its parameters, one train step of each phase, its plan. Nothing is allocated."""

import resource
import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from stackwise_jax.config import resolve
from stackwise_jax.models.rack import count_parameters, init_rack
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.branches import update_order
from stackwise_jax.train.curriculum import make_curriculum
from stackwise_jax.train.describe import describe
from stackwise_jax.train.machine import machine
from stackwise_jax.train.phases import Phase, Role, signature, stack_sizes
from stackwise_jax.train.plan import make_plan
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import PartSource, part_shape
from stackwise_jax.train.step import make_train_step
from stackwise_jax.types import Batch, Vocabulary

CONFIG_FILE = Path(__file__).resolve().parents[2] / "configs" / "llama_70b.py"
PARAMETERS = 68_976_648_192
GIB = 2**30


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return resolve(runpy.run_path(str(CONFIG_FILE))["get_config"]())


@pytest.fixture(autouse=True)
def _no_allocation() -> Any:
    """The process must not grow by even one block's weights (3.2 GiB)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GIB


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_rack_has_69_billion_parameters(config: RunConfig):
    sizes = stack_sizes(config)
    assert sizes == (1,) * 80
    rack = jax.eval_shape(lambda: init_rack(jax.random.key(0), config.model, sizes))
    assert size(rack) == count_parameters(config.model) == PARAMETERS
    assert round(PARAMETERS / 1e9, 2) == 68.98
    assert rack["stacks"][0]["mlp"]["up"]["kernel"].shape == (1, 8192, 28672)
    assert rack["stacks"][0]["attention"]["key"]["kernel"].shape == (1, 8192, 1024)


def step_shapes(config: RunConfig, phases: tuple[Phase, ...], index: int) -> tuple[Any, Any, Any]:
    """(state before, state after, metrics) of one update of a phase."""
    phase = phases[index]
    sig, key = signature(phase, phase.main, phases, config), jax.random.key(0)
    B, T = config.training.batch_size, config.data.seq_len
    vocabulary = Vocabulary(config.model.vocab_size, 4, (0, 1, 2, 3, 4))
    source = PartSource(config, key)
    state = source.snapshot_shape(phases, index, inside=True, head_has_table=sig.head_has_table, scaling={})
    frozen = {}
    if phase.main.head is Role.FROZEN:
        frozen["head"] = part_shape(config, key, "head", "head")

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    batch = Batch(ints(B, T), ints(B, T), ints(B, T), ints(B), ints(B))
    cached = jax.ShapeDtypeStruct((B, T, config.model.d_model), jnp.bfloat16) if phase.main.reads_activations else None
    step = make_train_step(Program(config, vocabulary, 1024), sig)
    fractions = jax.ShapeDtypeStruct((len(update_order(phase.main)),), jnp.float32)
    after, metrics = jax.eval_shape(step, state, frozen, batch, cached, fractions, ints())
    return state, after, metrics


@pytest.mark.parametrize(("index", "live"), [(0, 2 * 32000 * 8192 + 8192), (1, 855_654_400), (80, 855_654_400)])
def test_one_update_of_each_kind_of_phase(config: RunConfig, index: int, live: int):
    phases = make_curriculum(config)
    assert len(phases) == 81
    state, after, metrics = step_shapes(config, phases, index)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    assert size(after.params) == live
    assert size(after.optimizer) >= 2 * live
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params))
    assert {name: metric.shape for name, metric in metrics.items()} == {"loss": (), "gradient_norm": (), "weight": ()}


def test_plan_says_what_it_is_and_fits_at_the_start(config: RunConfig):
    plan = make_plan(config, None)
    text = describe(plan, machine(Path("run"), card="H200", host_gib=120.0, disk_gib=62.0, share=0.9))
    assert "68.98B parameters: 80 stacks of 1 block(s)" in text
    assert plan.compilations == 2
    assert all(phase.cached for phase in plan.phases[1:])
    assert "855.65M" in text
    assert "cache 80.0 GiB" in text
    assert "77 more phases like these" in text
    assert "verdict  fits on H200: device " in text
    assert "of 98.5 GiB, host " in text
    assert len(plan.phases) == 81

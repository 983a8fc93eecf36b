"""Updates against numpy; Muon treats every block's matrix on its own; the schedule and the clip by their formulas."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.schema import OptimizerConfig, RunConfig
from stackwise_jax.train.optimizer import (
    clip_scale,
    init_part,
    make_transforms,
    schedule_fraction,
    update_part,
    update_parts,
)

CONFIG = OptimizerConfig(learning_rate=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9, epsilon=1e-6)
MUON = dataclasses.replace(CONFIG, name="muon", muon_learning_rate=0.05, weight_decay=0.0)
ONE = jnp.float32(1.0)


def random_tree(seed: int, blocks: int = 2) -> dict[str, Any]:
    """A stack with a wide matrix, a tall one, and a vector, each with a block axis."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "up": jax.random.normal(keys[0], (blocks, 6, 10)),
        "down": jax.random.normal(keys[1], (blocks, 10, 6)),
        "scale": jax.random.normal(keys[2], (blocks, 6)),
    }


def run(transform: Any, params: Any, gradients: list[Any], fraction: Any = ONE) -> Any:
    state = transform.init(params)
    step = jax.jit(lambda grads, state, params: update_part(transform, grads, state, params, fraction))
    for grads in gradients:
        params, state = step(grads, state, params)
    return params


def adamw_by_numpy(p: np.ndarray, grads: list[np.ndarray], config: OptimizerConfig, rate: float, decay: float) -> Any:
    p, m, v = p.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g**2
        direction = m / (1 - config.beta1**t) / (np.sqrt(v / (1 - config.beta2**t)) + config.epsilon)
        p = p - rate * (direction + decay * p)
    return p


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_adamw_is_the_formula_and_decays_matrices_only(fraction: float):
    params, gradients = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    transform = make_transforms(RunConfig(optimizer=CONFIG), scales_head=False)["stacks"]
    ours = run(transform, params, gradients, jnp.float32(fraction))
    for name, decay in (("up", 0.2), ("down", 0.2), ("scale", 0.0)):
        grads = [np.asarray(g[name]) for g in gradients]
        expected = adamw_by_numpy(np.asarray(params[name]), grads, CONFIG, 0.1 * fraction, decay)
        np.testing.assert_allclose(ours[name], expected, rtol=2e-5, atol=2e-6)
        if decay:
            without = adamw_by_numpy(np.asarray(params[name]), grads, CONFIG, 0.1 * fraction, 0.0)
            assert not np.allclose(ours[name], without, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("part", ["embedding", "head"])
def test_tables_decay_and_their_norms_do_not(part: str):
    params = {"tokens": jnp.ones((4, 3)), "norm": {"scale": jnp.ones(3)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    moved = run(make_transforms(RunConfig(optimizer=CONFIG), scales_head=False)[part], params, [zero])
    np.testing.assert_allclose(moved["tokens"], 1 - 0.1 * 0.2, rtol=1e-6)
    np.testing.assert_array_equal(moved["norm"]["scale"], 1.0)


def test_the_head_s_rate_is_scaled_once_the_embedding_is_settled():
    config = dataclasses.replace(CONFIG, head_learning_rate_scale=0.5, weight_decay=0.0)
    params, grads = {"table": jnp.zeros((2, 2))}, [{"table": jnp.ones((2, 2))}]
    moves = {
        (part, scaled): float(
            run(make_transforms(RunConfig(optimizer=config), scales_head=scaled)[part], params, grads)["table"][0, 0]
        )
        for part in ("head", "embedding")
        for scaled in (False, True)
    }
    assert moves["head", True] == pytest.approx(0.5 * moves["head", False])
    assert moves["embedding", True] == moves["embedding", False] == pytest.approx(-0.1, rel=1e-4)


def muon_update(params: Any, gradients: list[Any]) -> Any:
    return jax.tree.map(
        jnp.subtract,
        run(make_transforms(RunConfig(optimizer=MUON), scales_head=False)["stacks"], params, gradients),
        params,
    )


def one_block(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index : index + 1], tree)


def test_muon_orthogonalises_every_block_s_matrix_on_its_own():
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    together = muon_update(params, gradients)
    for index in range(2):
        alone = muon_update(one_block(params, index), [one_block(g, index) for g in gradients])
        for name in together:
            np.testing.assert_allclose(together[name][index], alone[name][0], rtol=1e-4, atol=1e-6)


def test_muon_moves_all_directions_alike():
    update = muon_update(random_tree(0), [random_tree(1)])
    for name in ("up", "down"):
        for matrix in np.asarray(update[name]):
            values = np.linalg.svd(matrix, compute_uv=False)
            # Five Newton-Schulz steps leave the singular values between about 0.7 and 1.2 of one common value.
            assert values.max() / values.min() < 1.8
            wide = max(1.0, matrix.shape[1] / matrix.shape[0])  # outputs over inputs, as Jordan scales the rate
            assert np.mean(values) == pytest.approx(0.05 * math.sqrt(wide), rel=0.3)
    gradient_values = np.linalg.svd(np.asarray(random_tree(1)["up"][0]), compute_uv=False)
    assert gradient_values.max() / gradient_values.min() > 2.5  # which the gradient itself would fail


def test_muon_detects_blocks_taken_for_one_matrix():
    """Had the block axis been part of the matrix, a second block would change the first one's update."""
    one, two = random_tree(1, blocks=1), random_tree(1, blocks=2)
    joined = np.concatenate([np.asarray(block) for block in two["up"]])
    u, _, v = np.linalg.svd(joined, full_matrices=False)
    as_one = (u @ v)[:6]
    own_u, _, own_v = np.linalg.svd(np.asarray(two["up"][0]), full_matrices=False)
    update = np.asarray(muon_update(random_tree(0), [two])["up"][0])
    cosine = [abs(np.sum(update * d)) / np.linalg.norm(update) / np.linalg.norm(d) for d in (own_u @ own_v, as_one)]
    assert cosine[0] > 0.98 > cosine[1]
    assert one["up"].shape[0] == 1


def test_muon_leaves_vectors_to_adamw():
    """Not to NAdam, whose first update is larger by half."""
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    ours = run(make_transforms(RunConfig(optimizer=MUON), scales_head=False)["stacks"], params, gradients)["scale"]
    grads = [np.asarray(g["scale"]) for g in gradients]
    expected = adamw_by_numpy(np.asarray(params["scale"]), grads, MUON, 0.1, 0.0)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


def test_parts_are_updated_each_by_its_own_state():
    transforms = make_transforms(RunConfig(optimizer=CONFIG), scales_head=False)
    params = {"stacks": [random_tree(0), random_tree(1)], "head": {"table": jnp.ones((4, 3))}, "embedding": {}}
    grads = {"stacks": [random_tree(2), random_tree(3)], "head": {"table": jnp.ones((4, 3))}, "embedding": {}}
    states = {name: init_part(transforms, name, part) for name, part in params.items()}
    moved, new_states = update_parts(transforms, grads, states, params, jnp.ones(4))
    assert set(moved) == set(params)
    assert jax.tree.structure(new_states) == jax.tree.structure(states)
    alone = run(transforms["stacks"], params["stacks"][1], [grads["stacks"][1]])
    for name in alone:
        np.testing.assert_allclose(moved["stacks"][1][name], alone[name], rtol=2e-5, atol=2e-6)
    assert not np.allclose(moved["stacks"][0]["up"], moved["stacks"][1]["up"])


def test_a_fraction_of_zero_moves_nothing():
    params = random_tree(0)
    moved = run(
        make_transforms(RunConfig(optimizer=CONFIG), scales_head=False)["stacks"],
        params,
        [random_tree(1)],
        jnp.float32(0.0),
    )
    assert all(map(np.array_equal, jax.tree.leaves(moved), jax.tree.leaves(params)))


@pytest.mark.parametrize(
    ("norm", "clip", "scale"), [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (4.0, 0.0, 1.0), (0.0, 1.0, 1.0)]
)
def test_clip_brings_the_norm_down_and_never_up(norm: float, clip: float, scale: float):
    assert float(clip_scale(jnp.float32(norm), clip)) == pytest.approx(scale)


WSD = OptimizerConfig(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.1)


def test_wsd_warms_up_stays_and_decays():
    fractions = [schedule_fraction(WSD, step, 100) for step in range(100)]
    assert fractions[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert fractions[10:80] == [1.0] * 70
    differences = np.diff(fractions[79:])
    np.testing.assert_allclose(differences, -0.9 / 21, rtol=1e-9)  # linear; the update after the last would be at 0.1
    assert fractions[-1] == pytest.approx(0.1 + 0.9 / 21)


def test_cosine_is_half_way_in_the_middle():
    config = dataclasses.replace(WSD, schedule="cosine")
    assert schedule_fraction(config, 9, 100) == 1.0
    assert schedule_fraction(config, 10, 100) == 1.0
    assert schedule_fraction(config, 55, 100) == pytest.approx((1.0 + 0.1) / 2)
    assert schedule_fraction(config, 100, 100) == pytest.approx(0.1)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["wsd", "cosine"]),
    st.floats(0.0, 0.5),
    st.floats(0.0, 0.5),
    st.floats(0.0, 1.0),
    st.integers(1, 50),
)
def test_every_schedule_lies_between_0_and_1_and_falls_after_its_warm_up(
    schedule: str, warmup: float, decay: float, final: float, steps: int
):
    config = OptimizerConfig(schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, final_fraction=final)
    fractions = [schedule_fraction(config, step, steps) for step in range(steps)]
    assert all(0.0 <= fraction <= 1.0 + 1e-12 for fraction in fractions)
    assert fractions[0] > 0.0 or final == 0.0
    after = fractions[math.ceil(warmup * steps) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert all(fraction >= final - 1e-12 for fraction in after)

"""Unmasking: prompts stay, masks go, as many passes as asked, the order that was asked for, each row on its own."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackwise_jax.errors import UserError
from stackwise_jax.generate.denoise import check_length, denoise, pad_rows
from stackwise_jax.generate.reveal import Rule, row_keys
from tests.generate.reading import ALLOWED, MASK, MODEL, PAD, VOCAB, Told, check_filled, rack_denoiser

GREEDY = Rule(mask_id=MASK)
WARM = Rule(mask_id=MASK, temperature=1.0)
TABLE = jnp.array(np.random.default_rng(0).normal(0, 2, (16, VOCAB)), jnp.float32)


def filled(canvas: np.ndarray, rule: Rule = GREEDY, *, seed: int = 0, denoiser: Any = None, **options: Any) -> Any:
    keys = row_keys(jax.random.key(seed), len(canvas))
    denoiser = rack_denoiser() if denoiser is None else denoiser
    return denoise(denoiser, canvas, **({"keys": keys, "allowed": ALLOWED, "rule": rule} | options))


def ignore(*_: Any) -> None:
    """Records nothing."""


rows_of_any_kind = st.lists(
    st.lists(st.one_of(st.just(MASK), st.integers(1, 17)), min_size=1, max_size=8), min_size=3, max_size=3
)
RULES = {
    "greedy": (GREEDY, {}),
    "warm, penalised, nucleus": (dataclasses.replace(WARM, order="margin", repetition_penalty=1.5, top_p=0.8), {}),
    "masked again": (dataclasses.replace(WARM, order="random", remask=0.4), {"steps": 5}),
    "threshold, blocks": (dataclasses.replace(WARM, threshold=0.3, top_k=4), {"block_length": 3}),
}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(rows=rows_of_any_kind, seed=st.integers(0, 99))
def test_prompts_stay_and_masks_go(name: str, rows: list[list[int]], seed: int):
    rule, options = RULES[name]
    canvas = np.full((3, 8), PAD, np.int32)
    for row, own in zip(canvas, rows, strict=True):
        row[: len(own)] = own
    result, _ = filled(canvas, rule, seed=seed, denoiser=Told(TABLE, ignore), **options)
    check_filled(canvas, result)


@pytest.mark.parametrize(("place", "token"), [((0, 0), 4), ((0, 1), MASK), ((0, 1), 17), ((0, 3), 1)])
def test_the_law_of_a_filled_canvas_detects(place: tuple[int, int], token: int):
    canvas = np.array([[3, MASK, 5, PAD]])
    result = np.array([[3, 2, 5, PAD]])
    check_filled(canvas, result)
    result[place] = token
    with pytest.raises(AssertionError):
        check_filled(canvas, result)


def test_the_mask_is_not_drawn_even_where_it_is_likeliest_and_allowed():
    canvas = np.full((2, 6), MASK, np.int32)
    certain = Told(TABLE.at[:, MASK].set(50.0), ignore)
    result, _ = filled(canvas, GREEDY, denoiser=certain, allowed=np.ones(VOCAB, bool))
    assert not (result == MASK).any()


def test_temperature_zero_ignores_the_seed_and_others_do_not():
    canvas = np.full((2, 6), MASK, np.int32)
    cold = [filled(canvas, GREEDY, seed=seed)[0] for seed in (0, 1)]
    np.testing.assert_array_equal(*cold)
    warm = [filled(canvas, WARM, seed=seed)[0] for seed in (0, 1, 0)]
    np.testing.assert_array_equal(warm[0], warm[2])
    assert (warm[0] != warm[1]).any()


# --- passes ---


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 7),  # one a mask, of the row that has most
        ({"steps": 1}, 1),
        ({"steps": 3}, 3),
        ({"steps": 100}, 7),
        ({"block_length": 3}, 7),
        ({"steps": 5, "block_length": 3}, 6),  # 2 + 2 + 1 and 3 + 2 passes, and rows wait at the end of a block
        ({"steps": 3, "block_length": 3}, 4),  # 1 + 1 + 1 and 2 + 1
        ({"steps": 3, "block_length": 4}, 3),
    ],
)
def test_passes_are_as_asked(options: dict[str, int], passes: int):
    canvas = np.array([[1, *[MASK] * 7], [1, 2, 3, *[MASK] * 5]], np.int32)
    calls: list[int] = []
    told = Told(TABLE, lambda tokens, _: calls.append(int((tokens == MASK).sum())))
    _, counted = filled(canvas, GREEDY, denoiser=told, **options)
    jax.effects_barrier()
    assert (counted, len(calls)) == (passes, passes)
    assert calls == sorted(calls, reverse=True)


def test_masking_again_uses_every_step_and_is_quiet_at_the_end():
    canvas = np.full((2, 6), MASK, np.int32)
    seen: list[np.ndarray] = []
    told = Told(TABLE, lambda tokens, _: seen.append(np.array(tokens)))

    def returned(rule: Rule) -> list[bool]:
        seen.clear()
        _, passes = filled(canvas, rule, denoiser=told, steps=20)
        jax.effects_barrier()
        assert passes == len(seen)
        return [bool(((new == MASK) & (old != MASK)).any()) for old, new in itertools.pairwise(seen)]

    again = returned(dataclasses.replace(WARM, remask=0.5))
    assert len(again) == 19
    assert any(again[:-2])
    assert not any(again[-2:])  # the last tenth of twenty
    assert not any(returned(WARM))


def test_blocks_are_filled_left_to_right_and_without_them_places_are_not():
    canvas = np.array([[1, MASK, MASK, 5, MASK, MASK, MASK, 2]], np.int32)
    seen: list[np.ndarray] = []
    told = Told(TABLE, lambda tokens, _: seen.append(np.flatnonzero(np.array(tokens)[0] == MASK)))

    def first_block_first(**options: int) -> bool:
        seen.clear()
        filled(canvas, dataclasses.replace(GREEDY, order="random"), seed=1, denoiser=told, **options)
        jax.effects_barrier()
        return all(set(left) >= {5, 6} for left in map(np.ndarray.tolist, seen) if set(left) & {1, 2, 4})

    assert first_block_first(block_length=3)
    assert not first_block_first()


def test_a_threshold_reveals_what_is_sure_at_once():
    canvas = np.full((1, 6), MASK, np.int32)
    sure = Told(jnp.zeros((6, VOCAB)).at[jnp.arange(4), jnp.arange(1, 5)].set(20.0), ignore)
    result, passes = filled(canvas, dataclasses.replace(GREEDY, threshold=0.9), denoiser=sure)
    assert (result[0, :4].tolist(), passes) == ([1, 2, 3, 4], 3)  # four at once, then one a pass
    assert filled(canvas, dataclasses.replace(GREEDY, threshold=1.0), denoiser=Told(TABLE, ignore))[1] == 6


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(UserError, match=r"steps=2 is too few for 3 blocks of block_length=3"):
        filled(np.full((1, 7), MASK, np.int32), steps=2, block_length=3)


# --- against a naive sampler ---


def naive(canvas: np.ndarray, steps: int, order: str, penalty: float = 1.0) -> np.ndarray:
    """LLaDA's loop at temperature 0, a row at a time, in NumPy above the network."""
    network, result = jax.jit(rack_denoiser().__call__), canvas.copy()
    for b in range(len(canvas)):
        n = int((canvas[b] == MASK).sum())
        steps_here = min(steps, n)
        for step in range(steps_here):
            logits = np.asarray(network(jnp.array(result), jnp.zeros(len(canvas)))[b], np.float64)
            said = np.isin(np.arange(VOCAB), result[b])
            logits = np.where(said & (logits > 0), logits / penalty, np.where(said, logits * penalty, logits))
            logits[:, ~ALLOWED] = -np.inf
            shares = np.exp(logits - logits.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            ranked = np.sort(shares, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = -np.nansum(shares * np.log(shares), axis=1)
            scores = {
                "confidence": ranked[:, -1],
                "margin": ranked[:, -1] - ranked[:, -2],
                "entropy": -entropy,
                "left_to_right": -np.arange(len(shares), dtype=float),
            }[order]
            open_places = np.flatnonzero(result[b] == MASK)
            count = n // steps_here + (step < n % steps_here)
            best = open_places[np.argsort(-scores[open_places], kind="stable")[:count]]
            result[b, best] = np.argmax(shares, axis=1)[best]
    return result


CANVAS = pad_rows([np.array(row) for row in ([1, 16, *[MASK] * 6], [1, MASK, MASK, 7, MASK, 9], [2, *[MASK] * 4])], PAD)


@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "left_to_right"])
def test_the_result_is_the_naive_samplers(order: str):
    result, _ = filled(CANVAS, dataclasses.replace(GREEDY, order=order), steps=4)
    np.testing.assert_array_equal(result, naive(CANVAS, 4, order))


def test_repetition_is_penalised_as_in_the_naive_sampler_and_that_matters():
    plain, _ = filled(CANVAS, GREEDY)
    result, _ = filled(CANVAS, dataclasses.replace(GREEDY, repetition_penalty=3.0))
    np.testing.assert_array_equal(result, naive(CANVAS, 100, "confidence", 3.0))
    assert (result != plain).any()


def test_orders_differ():
    results = {order: naive(CANVAS, 4, order).tobytes() for order in ("confidence", "entropy", "left_to_right")}
    assert len(set(results.values())) == 3


# --- rows ---


def test_a_row_is_the_same_alone():
    together, _ = filled(CANVAS, WARM, steps=4)
    keys = row_keys(jax.random.key(0), 3)
    alone, _ = filled(CANVAS[1:2, :6], WARM, keys=keys[1:2], steps=4)
    np.testing.assert_array_equal(together[1, :6], alone[0])
    other, _ = filled(CANVAS[1:2, :6], WARM, keys=keys[:1], steps=4)
    assert (together[1, :6] != other[0]).any()  # a row's numbers are its own


def test_frequencies_are_the_softmax():
    n, logits = 3000, np.linspace(-1, 1, VOCAB).astype(np.float32)
    drawn, _ = filled(np.full((n, 1), MASK, np.int32), WARM, denoiser=Told(jnp.array(logits)[None, :], ignore))
    frequencies = np.bincount(drawn[:, 0], minlength=VOCAB) / n
    shares = np.where(ALLOWED, np.exp(logits), 0.0)
    assert np.abs(frequencies - shares / shares.sum()).max() < 5 * np.sqrt(0.1 / n)
    assert np.abs(frequencies - ALLOWED / ALLOWED.sum()).max() > 5 * np.sqrt(0.1 / n)


def test_a_shifted_head_is_read_one_place_before():
    tokens, rate = jnp.array(CANVAS), jnp.zeros(3)
    plain, shifted = rack_denoiser()(tokens, rate), rack_denoiser(shift=True)(tokens, rate)
    np.testing.assert_array_equal(shifted[:, 1:], plain[:, :-1])


def test_padding_is_seen_by_nobody():
    longer = np.pad(CANVAS, ((0, 0), (0, 3)), constant_values=PAD)
    short, long = (np.asarray(rack_denoiser()(jnp.array(rows), jnp.zeros(3))) for rows in (CANVAS, longer))
    np.testing.assert_allclose(short[1, :6], long[1, :6], rtol=2e-5, atol=2e-5)
    longer[1, 8] = 3
    assert np.abs(rack_denoiser()(jnp.array(longer), jnp.zeros(3))[1, :6] - short[1, :6]).max() > 1e-3


def test_learned_positions_bound_a_row():
    check_length(MODEL, 99)
    with pytest.raises(UserError, match=r"row of 17 tokens.*max_positions=16"):
        check_length(dataclasses.replace(MODEL, positions="learned"), 17)

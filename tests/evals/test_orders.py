"""Likelihoods in an order against a loop in NumPy that asks the denoiser place by place."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.evals.bound import Edges, Rows
from stackwise_jax.evals.orders import CHOSEN_ORDERS, ORDERS, given_order, order_likelihood, order_nll
from stackwise_jax.generate.denoise import denoise
from stackwise_jax.generate.reveal import Rule, row_keys
from tests.evals.tables import BYTES, MASK, T, Table, V, table

BANDS = ((0.6, 1.0), (0.2, 0.6), (1e-3, 0.2))
TABLES = [table(seed) for seed in range(3)]
KEY = jax.random.key(4)


def some_rows(n_rows: int = 24) -> Rows:
    """Rows with two to six eligible places, and one with none."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (n_rows, T)).astype(np.int32)
    eligible = np.argsort(rng.random((n_rows, T)), axis=1) < rng.integers(2, T + 1, n_rows)[:, None]
    eligible[5] = False
    return Rows(tokens, eligible, np.arange(n_rows, dtype=np.int32))


ROWS = some_rows()


def certainty(logits: np.ndarray, order: str) -> np.ndarray:
    """How early each place is revealed, over the ids that may stand there."""
    probabilities = np.exp(logits[:, :MASK]) / np.exp(logits[:, :MASK]).sum(1, keepdims=True)
    falling = np.sort(probabilities, axis=1)[:, ::-1]
    if order == "confidence":
        return falling[:, 0]
    return falling[:, 0] - falling[:, 1] if order == "margin" else (probabilities * np.log(probabilities)).sum(1)


def naive(
    denoisers: Sequence[Callable], bands: Sequence[Edges], row: int, order: str, ranks: np.ndarray | None = None
) -> np.ndarray:
    """-log p of each place of a row when its turn comes."""
    text, masked, nats = ROWS.tokens[row], ROWS.eligible[row].copy(), np.zeros(T)
    n = masked.sum()
    for m in range(n, 0, -1):
        own = next(d for d, (low, high) in zip(denoisers, bands, strict=True) if (low > 1e-3) * low < m / n <= high)
        shown = np.where(masked, MASK, text)
        logits = np.asarray(own(jnp.array(shown[None]), jnp.zeros(1)), np.float64)[0]
        scores = -ranks if ranks is not None else certainty(logits, order)
        place = int(np.argmax(np.where(masked, scores, -np.inf)))
        nats[place] = np.log(np.exp(logits[place]).sum()) - logits[place, text[place]]
        masked[place] = False
    return nats


def ranks_of(order: str) -> np.ndarray:
    return np.asarray(given_order(order, ROWS, KEY))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bands", [BANDS, ((0.0, 1.0),), BANDS[::-1]], ids=["bands", "whole", "lightest leftmost"])
def test_each_place_costs_what_a_loop_says(order: str, bands: tuple[Edges, ...]):
    own = TABLES[: len(bands)]
    given = order not in CHOSEN_ORDERS
    found = order_nll(own, ROWS, given_order(order, ROWS, KEY) if given else order, bands=bands, mask_id=MASK)
    ranks = ranks_of(order) if given else np.zeros((len(ROWS.tokens), T))
    expected = [naive(own, bands, row, order, ranks[row] if given else None) for row in range(len(ranks))]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    total = order_likelihood([(ROWS, own)], order, bands=bands, mask_id=MASK, piece_bytes=BYTES, key=KEY)
    assert total.tokens == ROWS.eligible.sum()
    assert total.loss * total.tokens == pytest.approx(np.sum(expected), rel=1e-5)


def test_the_loop_tells_orders_and_bands_apart():
    """What the law above compares differs wherever the order, or the band of a place, is another."""

    def totals(tables: Sequence[Table], order: str) -> np.ndarray:
        ranks = ranks_of(order) if order not in CHOSEN_ORDERS else [None] * len(ROWS.tokens)
        return np.array([naive(tables, BANDS, row, order, ranks[row]).sum() for row in range(12)])

    losses = [totals(TABLES, order) for order in ORDERS] + [totals(TABLES[::-1], "confidence")]
    for one, other in itertools.combinations(losses, 2):
        assert np.abs(one - other).max() > 0.01


def test_random_orders_are_of_the_row():
    ranks = ranks_of("random")
    assert {tuple(sorted(row)) for row in ranks.tolist()} == {tuple(range(T))}
    assert len({tuple(row) for row in ranks.tolist()}) > 20
    last = Rows(ROWS.tokens[-3:], ROWS.eligible[-3:], ROWS.row_ids[-3:])
    np.testing.assert_array_equal(given_order("random", last, KEY), ranks[-3:])
    assert (np.asarray(given_order("random", ROWS, jax.random.key(5))) != ranks).any()


def test_the_likelihood_is_that_of_the_sampler_that_takes_the_likeliest():
    """At temperature 0, one place a pass, confidence reveals in the order that the likelihood is taken in.

    So the text that it writes costs at every place the largest probability that was left, and revealing it in another
    order costs something else.
    """
    safe = Table(TABLES[0].logits.at[:, :, MASK].set(-30.0))
    canvas = np.full((1, T), MASK, np.int32)
    allowed = np.arange(V) != MASK
    written, passes = denoise(safe, canvas, keys=row_keys(KEY, 1), allowed=allowed, rule=Rule(mask_id=MASK))
    assert passes == T
    rows = Rows(written, np.ones((1, T), bool), np.zeros(1, np.int32))
    nats = np.asarray(order_nll([safe], rows, "confidence", bands=((0.0, 1.0),), mask_id=MASK))[0]
    shown, best = canvas.copy(), []
    for _ in range(T):
        probabilities = np.asarray(jax.nn.softmax(safe(jnp.array(shown), jnp.zeros(1)), axis=-1))[0].max(1)
        place = int(np.argmax(np.where(shown[0] == MASK, probabilities, -1)))
        best.append((place, -np.log(probabilities[place])))
        shown[0, place] = written[0, place]
    np.testing.assert_allclose(nats[[place for place, _ in best]], [cost for _, cost in best], rtol=1e-4, atol=1e-5)
    turned = np.asarray(
        order_nll([safe], rows, given_order("right_to_left", rows, KEY), bands=((0.0, 1.0),), mask_id=MASK)
    )
    assert turned.sum() != pytest.approx(nats.sum(), rel=1e-3)

"""Training from cached activations gives the bits that recomputing them gives, in float32."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.data.pipeline import make_batches
from stackwise_jax.memory import activations
from stackwise_jax.train import loop
from stackwise_jax.train.plan import make_plan

OBJECTIVES = {
    "causal": {},
    "masked": {"objective__name": "mlm", "model__attention": "bidirectional", "objective__rate_max": 0.5},
    "experts": {"model__experts__count": 4, "model__experts__d_ff": 16, "precision__trunk": "nf4"},
}


Rack = list[np.ndarray]


def leaves(config: Any, corpus: Any, folder: Path) -> Rack:
    rack = loop.run(config, corpus, folder, say=lambda _: None).rack
    return [np.asarray(leaf) for leaf in jax.tree.leaves(rack)]


@pytest.fixture(scope="module")
def train(tiny: Any, tiny_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Rack]:
    """Trains `tiny(**overrides)`, each once for all tests."""
    known: dict[str, Rack] = {}

    def once(**overrides: Any) -> Rack:
        name = repr(sorted(overrides.items()))
        if name not in known:
            known[name] = leaves(tiny(**overrides), tiny_corpus, tmp_path_factory.mktemp("run") / "run")
        return known[name]

    return once


RECOMPUTED = {"training__progressive__cache_activations": False}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cache_is_recompute(objective: str, train: Any) -> None:
    own = OBJECTIVES[objective]
    for one, other in zip(train(**own), train(**own, **RECOMPUTED), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("storage", [{}, {"precision__cache": "fp8"}])
def test_every_tier_gives_the_same_bits(storage: dict[str, str], train: Any) -> None:
    racks = [train(**storage), train(**storage, cache__tier="host"), train(**storage, cache__tier="disk")]
    for one, *others in zip(*racks, strict=True):
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_fp8_storage_is_not_exact(train: Any) -> None:
    """The twin of equal tiers: another storage is seen in the weights."""
    pairs = zip(train(), train(precision__cache="fp8"), strict=True)
    assert any(not np.array_equal(one, other) for one, other in pairs)


def test_a_finished_run_keeps_no_shards(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    config = tiny(cache__tier="disk", model__architecture__n_stacks=1)
    run = loop.Run(config, tiny_corpus, tmp_path / "run", lambda _: None)
    seen: list[Path] = []
    original = run.inputs.clear

    def look() -> None:
        seen.extend((tmp_path / "run" / "cache").rglob("*.chunk"))
        original()

    run.inputs.clear = look
    run.to_end()
    assert seen
    assert not list((tmp_path / "run" / "cache").rglob("*.chunk"))


def test_windows_are_recompute_too(tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    """A window that is entered in the middle of a phase is filled through the whole trunk."""
    windows = {"cache__window_gib": 1e-4, "cache__window_visits": 1, "cache__chunk_bytes": 40_000}
    config = tiny(**windows)
    plan = make_plan(config, tiny_corpus.train.n_rows)
    assert plan.order.layout.n_windows > 2
    assert len({plan.order.window(step) for step in range(16, 22)}) > 1
    cached = leaves(config, tiny_corpus, tmp_path / "cached")
    on_disk = dataclasses.replace(config, cache=dataclasses.replace(config.cache, tier="disk"))
    again = leaves(on_disk, tiny_corpus, tmp_path / "disk")
    # Without a cache there are no windows, so the order of rows is forced to be theirs.
    recomputed = loop.Run(
        tiny(training__progressive__cache_activations=False), tiny_corpus, tmp_path / "recomputed", lambda _: None
    )
    recomputed.batches = iter(make_batches(tiny_corpus.train, plan.order, isolate_documents=True))
    for one, other, third in zip(cached, again, jax.tree.leaves(recomputed.to_end().rack), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, np.asarray(third))


def test_cache_is_recompute_detects_a_stale_cache(
    tiny: Any, tiny_corpus: Any, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an advance that stores what it read."""

    def forget(stored: Any, x: Any, *_: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf + 0 * jnp.sum(x), stored)

    monkeypatch.setattr(activations, "_write", forget)
    stale = leaves(tiny(), tiny_corpus, tmp_path)
    assert any(not np.array_equal(one, other) for one, other in zip(stale, train(**RECOMPUTED), strict=True))

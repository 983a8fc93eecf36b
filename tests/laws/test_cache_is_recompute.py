"""Training from cached activations gives the bits that recomputing them gives, in float32."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory import activations
from stackwise_jax.train import loop

OBJECTIVES = {
    "causal": {},
    "masked": {"objective__name": "mlm", "model__attention": "bidirectional", "objective__rate_max": 0.5},
}


def leaves(config: Any, corpus: Any, folder: Path) -> list[np.ndarray]:
    rack = loop.run(config, corpus, folder, say=lambda _: None).rack
    return [np.asarray(leaf) for leaf in jax.tree.leaves(rack)]


def both(tiny: Any, corpus: Any, folder: Path, **overrides: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    cached = tiny(training__progressive__cache_activations=True, **overrides)
    recomputed = tiny(training__progressive__cache_activations=False, **overrides)
    return leaves(cached, corpus, folder / "cached"), leaves(recomputed, corpus, folder / "recomputed")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_cache_is_recompute(objective: str, tiny: Any, tiny_corpus: Any, tmp_path: Path) -> None:
    for one, other in zip(*both(tiny, tiny_corpus, tmp_path, **OBJECTIVES[objective]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_cache_is_recompute_detects_a_stale_cache(
    tiny: Any, tiny_corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an advance that stores what it read."""
    monkeypatch.setattr(activations, "_write", lambda values, x, offset: values + 0 * jnp.sum(x))
    cached, recomputed = both(tiny, tiny_corpus, tmp_path)
    assert any(not np.array_equal(one, other) for one, other in zip(cached, recomputed, strict=True))

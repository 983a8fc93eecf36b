"""From the config to `corrupt`: the one function through which every step sees its data."""

import functools
from collections.abc import Callable

from stackwise_jax.objectives import clm, mlm
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Key, Vocabulary

Corrupt = Callable[[Key, Batch], Example]
"""(key of the run's masks, batch) -> example; jittable. `batch.visits` chooses the variant of each row."""


def make_corrupt(config: ObjectiveConfig, vocabulary: Vocabulary, *, n_rows: int) -> Corrupt:
    """Builds the objective's corruption for a corpus of `n_rows` rows."""
    if config.name == "clm":
        return clm.corrupt
    return functools.partial(mlm.corrupt, config=config, vocabulary=vocabulary, n_rows=n_rows)


def variants(config: ObjectiveConfig) -> int:
    """How many corruptions of a row a cache must hold; a causal row has only itself."""
    return 1 if config.name == "clm" else config.mask_variants

"""From the config to `corrupt`: which tasks a run has, and the one function through which every step sees its data."""

import dataclasses
import functools
import math
from collections.abc import Callable

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.objectives import block_diffusion, clm, diffusion, mlm, prefix
from stackwise_jax.objectives.rates import mean_rate
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Batch, Example, Key, Vocabulary

Corrupt = Callable[[Key, Batch], Example]
"""(key of the run's masks, batch) -> example; jittable. `batch.visits` chooses the variant of each row."""

# What a place may see under each objective, where the model does not say.
ATTENTION = {
    "clm": "causal",
    "mlm": "bidirectional",
    "prefix": "prefix",
    "diffusion": "bidirectional",
    "block_diffusion": "block_diffusion",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing that a model is asked, and the attention under which it is.

    Attributes:
      objective: clm | mlm | prefix | diffusion | block_diffusion.
      attention: a mask kind: causal | bidirectional | prefix | block_diffusion | block_causal.
    """

    objective: str
    attention: str


def tasks(objective: ObjectiveConfig, attention: str) -> tuple[tuple[Task, float], ...]:
    """The tasks of a run with the share of the updates that each has; the shares sum to 1.

    Args:
      attention: the model's, under which `mlm` and `diffusion` run where they are all there is.

    Raises:
      UserError: a malformed `objective.mixture`.

    >>> tasks(ObjectiveConfig(name="mixed", mixture="clm@3; diffusion@1"), "bidirectional")
    ((Task(objective='clm', attention='causal'), 0.75), (Task(objective='diffusion', attention='bidirectional'), 0.25))
    """
    if objective.name != "mixed":
        follows_model = objective.name in ("mlm", "diffusion")
        return ((Task(objective.name, attention if follows_model else ATTENTION[objective.name]), 1.0),)
    members = _members(objective.mixture)
    total = math.fsum(members.values())
    return tuple((Task(name, ATTENTION[name]), weight / total) for name, weight in members.items())


def make_corrupt(config: ObjectiveConfig, task: Task, vocabulary: Vocabulary, *, n_rows: int) -> Corrupt:
    """Builds the corruption of one of the run's tasks for a corpus of `n_rows` rows.

    Masked objectives take each row's rates from its `Batch.bands`, or from the config's range where that is None.
    """
    masked = {"config": config, "vocabulary": vocabulary, "n_rows": n_rows}
    match task.objective:
        case "clm":
            return clm.corrupt
        case "prefix":
            return functools.partial(prefix.corrupt, share=config.prefix_share)
        case "mlm":
            return functools.partial(mlm.corrupt, **masked)
        case "diffusion":
            return functools.partial(diffusion.corrupt, **masked)
        case "block_diffusion":
            return functools.partial(block_diffusion.corrupt, **masked)
    raise ValueError(f"no such objective: {task.objective!r}")


def asked_share(config: ObjectiveConfig, task: Task, band: tuple[float, float] | None) -> float:
    """Which part of the places a task asks for, on average; of the two halves under block diffusion together.

    Args:
      band: of masked fractions; None: the config's whole range.
    """
    if task.objective == "clm":
        return 1.0
    if task.objective == "prefix":
        return 1.0 - config.prefix_share / 2
    share = mean_rate(config, band)
    return share / 2 if task.objective == "block_diffusion" else share


def variants(config: ObjectiveConfig) -> int:
    """How many corruptions of a row a cache must hold; a causal row has only itself, a prefix is one of several."""
    names = _members(config.mixture) if config.name == "mixed" else [config.name]
    return 1 if list(names) == ["clm"] else config.mask_variants


def _members(mixture: str) -> dict[str, float]:
    """Objectives and their weights, as the mixture gives them."""
    members: dict[str, float] = {}
    for entry in filter(None, map(str.strip, mixture.split(";"))):
        name, _, text = (part.strip() for part in entry.partition("@"))
        if name not in ATTENTION:
            known = ", ".join(ATTENTION) + "." + did_you_mean(name, ATTENTION)
            raise UserError(f"objective.mixture={mixture!r} names {name!r}, which is none of: {known}")
        if name in members:
            raise UserError(f"objective.mixture={mixture!r} names {name!r} twice; give it one weight")
        members[name] = _weight(text, f"objective.mixture={mixture!r} weighs {name!r} by {text!r}")
    if not members:
        raise UserError(f'objective.mixture={mixture!r} names no objective; give such as "clm@0.5; diffusion@0.5"')
    return members


def _weight(text: str, found: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 1e-6 <= weight <= 1e6:
        raise UserError(f'{found}; give each objective a weight between 1e-6 and 1e6, such as "clm@0.5; diffusion@0.5"')
    return weight

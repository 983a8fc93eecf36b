"""Curricula that are refused: one line that names the field and the remedy, and why nothing can be cached."""

from typing import Any

import pytest
from curricula import ASSEMBLED, DIFFUSION, FULL, JOINT, QLORA, config_of

from stackwise_jax.errors import UserError
from stackwise_jax.train.curriculum import make_curriculum, unshared

DEPTH = {**DIFFUSION, "objective.time": "depth", "training.mode": "stackwise"}
REFUSALS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"training.mode": "end_to_end", "training.progressive.direction": "right_to_left"},
        ["training.progressive.direction='right_to_left'", "choose one of layerwise"],
    ),
    ({"training.progressive.trunk_strategy": "qlora"}, ["trunk_strategy='qlora'", "training.mode='progressive'"]),
    ({"training.progressive.trunk_strategy": "fro"}, ["trunk_strategy='fro'", "frozen, qlora, full"]),
    ({**QLORA, "training.progressive.last_stacks": 1}, ["training.progressive.last_stacks=1", "frozen trunk"]),
    ({**FULL, "training.progressive.anchor_every": 2}, ["training.progressive.anchor_every=2", "frozen trunk"]),
    ({**DEPTH, "training.progressive.anchor_every": 2}, ["training.progressive.anchor_every=2", "without"]),
    ({"training.progressive.anchor_every": 1}, ["training.progressive.anchor_every=1", "at least 2"]),
    ({"training.progressive.last_stacks": 4}, ["training.progressive.last_stacks=4", "below the 4 stacks"]),
    ({"training.progressive.rebuild_every": 4}, ["training.progressive.rebuild_every=4", "anchor_every"]),
    ({"training.growth.operator": "copy"}, ["training.growth.operator='copy'", "trunk_strategy='full'"]),
    ({"training.growth.sizes": "late"}, ["training.growth.sizes='late'", "trunk_strategy='full'"]),
    ({"training.growth.shares": "1,1"}, ["training.growth.shares='1,1'", "trunk_strategy='full'"]),
    ({**FULL, "training.progressive.shares": "1,1"}, ["training.progressive.shares='1,1'", "per phase"]),
    ({**FULL, "training.progressive.learning_rate_decay": 0.5}, ["learning_rate_decay=0.5", "per phase"]),
    (
        {**FULL, "training.progressive.direction": "right_to_left", "training.growth.operator": "copy"},
        ["training.growth.operator='copy'", "needs 'random'"],
    ),
    (
        {**FULL, "training.growth.operator": "zero_output", "model.norm_position": "post"},
        ["training.growth.operator='zero_output'", "model.norm_position='pre'"],
    ),
    ({**FULL, "training.growth.sizes": "2,1"}, ["training.growth.sizes='2,1'", '"1,4"']),
    ({**FULL, "training.growth.sizes": "1,5"}, ["training.growth.sizes='1,5'", "the 4 of the rack"]),
    ({**FULL, "training.growth.shares": "1,2"}, ["training.growth.shares='1,2'", "4 positive numbers"]),
    ({"training.progressive.shares": "1,a"}, ["training.progressive.shares='1,a'", "4 positive numbers"]),
    (
        {
            **DIFFUSION,
            "objective.time": "input",
            "training.execution": "chained",
            "training.embedding_phase": "with_first_stack",
        },
        ["training.execution='chained'", "'auto'"],
    ),
    ({"training.mode": "fusion"}, ["training.fusion.sources=''", "run folders"]),
    ({"training.fusion.sources": "runs/a"}, ["training.fusion.sources='runs/a'", "no other mode"]),
    ({"training.fusion.budget": "7"}, ["training.fusion.budget='7'", '"200 steps"']),
    ({**JOINT, "training.fusion.live": "some"}, ["training.fusion.live='some'", "last:N"]),
    ({**JOINT, "training.fusion.live": "last:5"}, ["training.fusion.live='last:5'", "up to 4 stacks"]),
    (
        {**JOINT, "training.fusion.live": "last:2", "training.fusion.unfreeze_phases": 3},
        ["training.fusion.unfreeze_phases=3", "2 live stacks"],
    ),
    ({**JOINT, "training.mode": "end_to_end"}, ["training.fusion.budget", "mode that grows"]),
    ({**JOINT, **DEPTH}, ["training.fusion.budget", "objective.time='depth'"]),
    ({**JOINT, "training.fusion.trunk_learning_rate_scale": -1.0}, ["trunk_learning_rate_scale=-1.0", "at least 0"]),
    ({**JOINT, **QLORA}, ["training.fusion.live='all'", "training.adapters.merge=True"]),
    (
        {**JOINT, **QLORA, "training.fusion.live": "adapters", "training.fusion.unfreeze_phases": 2},
        ["training.fusion.live='adapters'", "training.adapters.merge=True"],
    ),
    (
        {**ASSEMBLED, "training.head": "copy", "model.ties_embedding": True},
        ["training.head='copy'", "mode that grows"],
    ),
    ({**QLORA, "training.adapters.merge": True, "precision.trunk": "nf4"}, ["training.adapters.merge=True", "nf4"]),
    ({"training.progressive.direction": "independent"}, ["'independent'", "objective.time='depth'"]),
    ({"objective.n_bands": 2}, ["objective.n_bands=2", "objective.time='depth'"]),
    ({"objective.levels": "linear"}, ["objective.levels='linear'", "objective.time='depth'"]),
    ({"objective.consistency": 0.1}, ["objective.consistency=0.1", "objective.time='depth'"]),
    ({**DEPTH, "objective.name": "prefix", "model.attention": "causal"}, ["objective.time='depth'", "'prefix'"]),
    ({**DEPTH, "training.mode": "end_to_end"}, ["objective.time='depth'", "training.mode='end_to_end'"]),
    ({**DEPTH, "objective.n_bands": 5}, ["objective.n_bands=5", "at most 4"]),
    ({**DEPTH, "objective.level_min": 0.95}, ["objective.level_min=0.95", "level_max=0.9"]),
    ({**DEPTH, "objective.consistency": 0.1}, ["objective.consistency=0.1", "right_to_left"]),
    (
        {
            **DEPTH,
            "objective.name": "mlm",
            "objective.rate_max": 0.9,
            "objective.consistency": 0.1,
            "training.progressive.direction": "right_to_left",
        },
        ["objective.consistency=0.1", "objective.name='diffusion'"],
    ),
    ({**DEPTH, "objective.levels": "0.9,0.5"}, ["objective.levels='0.9,0.5'", "4 bands"]),
    ({"objective.name": "mixed"}, ["objective.mixture=''", "two objectives"]),
    ({"objective.mixture": "clm; mlm"}, ["objective.mixture='clm; mlm'", "objective.name='mixed'"]),
    (
        {"objective.name": "mixed", "objective.mixture": "clm@0.5; mlm@0.5"},
        ["objective.mixture='clm@0.5; mlm@0.5'", "objective.shift=True"],
    ),
]


@pytest.mark.parametrize(("fields", "words"), REFUSALS, ids=lambda value: ",".join(value) if value else "")
def test_what_does_not_fit_together_is_refused_in_one_line(fields: dict[str, Any], words: list[str]):
    with pytest.raises(UserError) as caught:
        make_curriculum(config_of(fields))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


CACHE = {"training.progressive.cache_activations": True}
SHARED: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"objective.name": "mixed", "objective.mixture": "clm@1; mlm@1", "objective.shift": True}, "different ways"),
    ({"objective.name": "block_diffusion"}, "reads every row twice"),
    ({**DIFFUSION, "objective.rate_draw": "stratified"}, "depends on the batch"),
    ({"training.progressive.anchor_every": 2}, "declare training.progressive.rebuild_every"),
    ({"training.progressive.anchor_every": 2, "training.progressive.rebuild_every": 2}, None),
    ({"training.progressive.cache_activations": False}, "cache_activations=False"),
    ({**DEPTH, "training.progressive.direction": "independent"}, "take turns"),
]


@pytest.mark.parametrize(("fields", "reason"), SHARED, ids=lambda value: ",".join(value) if value else "none")
def test_why_one_cache_cannot_serve_a_phase(fields: dict[str, Any], reason: str | None):
    config = config_of(fields)
    found = unshared(config)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    assert any(phase.cached for phase in make_curriculum(config)) == (reason is None)
    if reason is not None and "cache_activations" not in reason:
        with pytest.raises(UserError, match=f"cache_activations=True, but .* cannot be cached: .*{reason}"):
            make_curriculum(config_of({**fields, **CACHE}))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"training.progressive.direction": "right_to_left"}, "its settled stacks are a tail"),
        (QLORA, "its trunk is trained through adapters"),
        (FULL, "its frozen prefix is empty"),
        (ASSEMBLED, "nothing is trained"),
        ({**ASSEMBLED, **JOINT}, "its frozen prefix is empty"),
    ],
    ids=str,
)
def test_a_cache_is_refused_by_the_path_that_forbids_it(fields: dict[str, Any], reason: str):
    with pytest.raises(UserError, match=f"cache_activations=True, but .*{reason}"):
        make_curriculum(config_of({**fields, **CACHE}))

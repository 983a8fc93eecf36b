"""Every way of training, at tiny size: config overrides by name, for the tests that hold of all of them."""

from typing import Any

_MASKED = {"model__attention": "bidirectional", "objective__name": "diffusion"}
_DEPTH = {**_MASKED, "objective__time": "depth", "objective__n_bands": 2, "model__architecture__n_stacks": 4}
_PROGRESSIVE = {"training__mode": "progressive"}
_FULL = {**_PROGRESSIVE, "training__progressive__trunk_strategy": "full", "training__phase_budget": "12 steps"}
_FULL |= {"model__architecture__n_stacks": 4}

MODES: dict[str, dict[str, Any]] = {
    "right to left": {"training__progressive__direction": "right_to_left", "precision__trunk": "nf4"},
    "progressive, adapters": {
        **_PROGRESSIVE,
        "training__progressive__trunk_strategy": "qlora",
        "precision__trunk": "nf4",
        "training__adapters__ranks": "2,4,4",
    },
    "progressive, right to left, adapters on the tail": {
        **_PROGRESSIVE,
        "training__progressive__trunk_strategy": "qlora",
        "training__progressive__direction": "right_to_left",
        "training__adapters__merge": True,
        "training__execution": "chained",
    },
    "one late expansion, copied": {**_FULL, "training__growth__sizes": "late", "training__growth__operator": "copy"},
    "doubling, interleaved": {
        **_FULL,
        "training__growth__sizes": "doubling",
        "training__growth__operator": "interleave",
    },
    "doubling, adding nothing": {
        **_FULL,
        "training__growth__sizes": "1,2,4",
        "training__growth__operator": "zero_output",
        "precision__optimizer": "int8",
    },
    "grown from the right, all live": {**_FULL, "training__progressive__direction": "right_to_left"},
    "last stack in every phase": {"training__progressive__last_stacks": 1},
    "anchors, recomputed": {"training__progressive__anchor_every": 3},
    "anchors, cache computed anew": {
        "training__progressive__anchor_every": 2,
        "training__progressive__rebuild_every": 4,
    },
    "stacks, then all together": {
        "training__fusion__budget": "6 steps",
        "training__fusion__trunk_learning_rate_scale": 0.3,
        "precision__trunk": "bf16",
    },
    "stacks, then gradually": {
        "training__fusion__budget": "8 steps",
        "training__fusion__unfreeze_phases": 2,
        "training__head": "frozen",
    },
    "stacks, then adapters": {"training__fusion__budget": "6 steps", "training__fusion__live": "adapters"},
    "diffusion, end to end, told the time": {
        **_MASKED,
        "objective__time": "input",
        "training__mode": "end_to_end",
        "training__phase_budget": "8 steps",
    },
    "diffusion in stacks, cached": {**_MASKED, "objective__noise_schedule": "cosine", "objective__mask_variants": 2},
    "depth as time, independent": {
        **_DEPTH,
        "training__progressive__direction": "independent",
        "training__embedding_phase": "with_first_stack",
    },
    "depth as time, right to left, told the time, consistent": {
        **_DEPTH,
        "objective__time": "depth_input",
        "objective__consistency": 0.1,
        "training__progressive__direction": "right_to_left",
    },
    "depth as time, left to right": _DEPTH,
    "depth as time, levels": {
        **_DEPTH,
        "objective__levels": "linear",
        "training__progressive__direction": "right_to_left",
    },
    "one network, three readings": {
        "objective__name": "mixed",
        "objective__mixture": "clm@0.5; mlm@0.25; diffusion@0.25",
        "objective__shift": True,
        "training__mode": "end_to_end",
        "training__phase_budget": "8 steps",
    },
    "prefix": {"objective__name": "prefix", "training__mode": "end_to_end", "training__phase_budget": "8 steps"},
    "block diffusion": {
        "objective__name": "block_diffusion",
        "objective__block_length": 8,
        "training__mode": "stackwise",
    },
}

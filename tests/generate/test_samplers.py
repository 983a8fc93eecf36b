"""Which samplers a run can be read by, under which attention, in blocks of how many places."""

from typing import Any

import pytest

from stackwise_jax.checks.generation import block_length, reading_attention, samplers
from stackwise_jax.errors import UserError

BOTH = {"model__attention": "bidirectional"}
DEPTH = {"objective__time": "depth", "training__progressive__direction": "right_to_left"}
MIXED = {"objective__name": "mixed", "objective__shift": True}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, ("autoregressive",)),
        ({"objective__name": "prefix"}, ("autoregressive",)),
        ({"objective__name": "mlm", **BOTH}, ("denoise", "blocks")),
        ({"objective__name": "mlm"}, ("denoise",)),
        ({"objective__name": "diffusion", **BOTH}, ("denoise", "blocks")),
        ({"objective__name": "diffusion", **BOTH, **DEPTH}, ("denoise",)),
        ({"objective__name": "block_diffusion"}, ("blocks", "denoise")),
        ({**MIXED, "objective__mixture": "diffusion@0.7; clm@0.3"}, ("autoregressive", "denoise", "blocks")),
        ({**MIXED, "objective__mixture": "mlm@0.5; block_diffusion@0.5"}, ("denoise", "blocks")),
        ({**MIXED, "objective__mixture": "block_diffusion@0.5; mlm@0.5"}, ("blocks", "denoise")),
    ],
)
def test_a_run_is_read_by_its_objectives(overrides: dict[str, Any], expected: tuple[str, ...], tiny: Any):
    assert samplers(tiny(**overrides)) == expected
    others = {"autoregressive", "denoise", "blocks"} - set(expected)
    for other in others:
        with pytest.raises(UserError, match=f"generation.sampler='{other}' cannot read this run.*: {expected[0]}"):
            tiny(**overrides, generation__sampler=other, generation__block_length=4)


def test_the_attention_is_that_of_the_sampler(tiny: Any):
    mixed = tiny(**MIXED, objective__mixture="clm@0.5; diffusion@0.5")
    assert [reading_attention(mixed, sampler) for sampler in ("autoregressive", "denoise")] == [
        "causal",
        "bidirectional",
    ]
    assert reading_attention(tiny(objective__name="mlm"), "denoise") == "causal"
    assert reading_attention(tiny(objective__name="prefix"), "autoregressive") == "causal"


def test_blocks_are_as_long_as_they_were_trained(tiny: Any):
    run = {"objective__name": "block_diffusion", "objective__block_length": 8}
    assert block_length(tiny(**run)) == 8
    assert block_length(tiny(**run, generation__block_length=4)) == 4
    assert block_length(tiny(objective__name="mlm", **BOTH)) is None
    with pytest.raises(UserError, match=r"needs generation\.block_length"):
        tiny(objective__name="mlm", **BOTH, generation__sampler="blocks")

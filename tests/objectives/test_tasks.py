"""From the config to tasks, their shares and the corruptions of a row; every refusal says what is wrong."""

import dataclasses

import pytest

from stackwise_jax.errors import UserError
from stackwise_jax.objectives.objective import Task, make_corrupt, tasks, variants
from stackwise_jax.schema import ObjectiveConfig
from stackwise_jax.types import Vocabulary

NAMES = ("clm", "mlm", "prefix", "diffusion", "block_diffusion")


def mixed(mixture: str) -> ObjectiveConfig:
    return ObjectiveConfig(name="mixed", mixture=mixture, mask_variants=7)


@pytest.mark.parametrize("attention", ["bidirectional", "causal", "block_causal"])
@pytest.mark.parametrize("name", NAMES)
def test_one_objective_is_one_task(name: str, attention: str):
    own = {"clm": "causal", "prefix": "prefix", "block_diffusion": "block_diffusion"}
    expected = Task(name, own.get(name, attention))
    assert tasks(ObjectiveConfig(name=name), attention) == ((expected, 1.0),)
    assert hash(expected) == hash(dataclasses.replace(expected))


def test_a_mixture_has_shares_and_an_attention_for_each():
    shares = dict(tasks(mixed(" clm@1; diffusion @ 2 ;mlm@0.5; prefix@0.25;block_diffusion@0.25 "), "causal"))
    assert shares == {
        Task("clm", "causal"): 0.25,
        Task("diffusion", "bidirectional"): 0.5,
        Task("mlm", "bidirectional"): 0.125,
        Task("prefix", "prefix"): 0.0625,
        Task("block_diffusion", "block_diffusion"): 0.0625,
    }


@pytest.mark.parametrize(
    ("mixture", "complaint"),
    [
        ("", "names no objective"),
        (" ; ", "names no objective"),
        ("clm@0.5; difusion@0.5", "'difusion'.*Did you mean \"diffusion\""),
        ("clm@0.5; mixed@0.5", "'mixed', which is none of"),
        ("clm@0.5; clm@0.5", "'clm' twice"),
        ("clm@0.5; diffusion", "'diffusion' by ''.*a weight between"),
        ("clm@half", "'clm' by 'half'"),
        ("clm@0", "'clm' by '0'"),
        ("clm@-1", "'clm' by '-1'"),
        ("clm@nan", "'clm' by 'nan'"),
        ("clm@inf", "'clm' by 'inf'"),
        ("clm@1@2", "'clm' by '1@2'"),
        ("clm, diffusion", "'clm, diffusion', which is none of"),
    ],
)
def test_a_malformed_mixture_is_refused(mixture: str, complaint: str):
    for read in (lambda config: tasks(config, "causal"), variants):
        with pytest.raises(UserError, match=f"objective.mixture={mixture!r} .*{complaint}"):
            read(mixed(mixture))


def test_a_causal_row_has_one_corruption():
    assert variants(ObjectiveConfig(name="clm", mask_variants=7)) == 1
    assert variants(mixed("clm@1")) == 1
    assert variants(mixed("clm@0.9; mlm@0.1")) == 7
    for name in NAMES[1:]:
        assert variants(ObjectiveConfig(name=name, mask_variants=7)) == 7


def test_an_unknown_task_is_a_fault_of_ours():
    with pytest.raises(ValueError, match="no such objective: 'mixed'"):
        make_corrupt(ObjectiveConfig(), Task("mixed", "causal"), Vocabulary(8, 4, (4,)), n_rows=1)

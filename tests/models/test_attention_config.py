"""What a config may ask of each kind of attention: derived widths, and one line for what a kind cannot do."""

import json
from typing import Any

import jax.numpy as jnp
import pytest

from stackwise_jax.checks.generation import samplers
from stackwise_jax.config import resolve, to_json
from stackwise_jax.errors import UserError
from stackwise_jax.interop import kinds
from stackwise_jax.models import families, weights
from stackwise_jax.models.stores import init_store
from stackwise_jax.schema import RunConfig

LINEAR = {"attention_kind": "kernel", "kernel": {"form": "linear"}}


def resolved(model: dict[str, Any], **sections: Any) -> RunConfig:
    return resolve({"model": model, **sections})


def test_widths_are_those_of_deepseek_where_none_are_given():
    model = resolved({"attention_kind": "mla", "d_head": 128, "n_heads": 2}).model
    assert (model.latent.kv_rank, model.latent.d_rope, model.latent.d_value) == (512, 64, 128)
    assert model.latent.query_rank is None
    assert resolved({"attention_kind": "mla", "d_head": 7, "latent": {"d_rope": 4}}).model.latent.d_rope == 4


def test_the_kernel_follows_the_kind():
    families = [resolved({"attention_kind": kind}).model.kernel.family for kind in ("kernel", "mlgka", "mha")]
    assert families == ["gaussian", "laplacian", None]


@pytest.mark.parametrize("kind", ["mha", "mla", "kernel", "mlgka"])
def test_resolved_kinds_resolve_to_themselves(kind: str):
    config = resolved({"attention_kind": kind})
    assert resolve(json.loads(to_json(config))) == config


REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"attention_kind": "mlka"}, {}, ["model.attention_kind='mlka'", "Did you mean"]),
    ({"latent": {"kv_rank": 8}}, {}, ["model.latent.kv_rank=8", "mla or mlgka", "'mha'"]),
    ({"attention_kind": "mla", "kernel": {"seed": 1}}, {}, ["model.kernel.seed=1", "kernel or mlgka"]),
    ({"attention_kind": "mla", "latent": {"form": "joint"}}, {}, ["model.latent.form='joint'", "shared, separate"]),
    ({"attention_kind": "mla", "latent": {"d_rope": 3}}, {}, ["model.latent.d_rope=3", "even"]),
    ({"attention_kind": "mla", "d_head": 2, "n_heads": 2}, {}, ["model.latent.d_rope=1", "at least 2"]),
    (
        {"attention_kind": "mla", "latent": {"form": "separate", "d_rope": 4}},
        {},
        ["model.latent.d_rope=4", "form='shared'", "'separate'"],
    ),
    (
        {"attention_kind": "mla", "positions": "none", "latent": {"d_rope": 4}},
        {},
        ["model.latent.d_rope=4", "positions='rotary'", "'none'"],
    ),
    ({"attention_kind": "kernel", "kernel": {"family": "cauchy"}}, {}, ["model.kernel.family='cauchy'", "laplacian"]),
    ({"attention_kind": "kernel", "kernel": {"n_features": 7}}, {}, ["model.kernel.n_features=7", "even"]),
    ({"attention_kind": "kernel", "kernel": {"bandwidth": 0.0}}, {}, ["model.kernel.bandwidth=0.0", "above 0"]),
    ({"attention_kind": "kernel", "kernel": {"scale": -1.0}}, {}, ["model.kernel.scale=-1.0", "above 0"]),
    (
        {"attention_kind": "kernel", "kernel": {"family": "linear", "bandwidth": 1.0}},
        {},
        ["model.kernel.bandwidth=1.0", "family='linear'"],
    ),
    (
        {"attention_kind": "kernel", "kernel": {"positive_features": 8}},
        {},
        ["model.kernel.positive_features=8", "form='linear'", "'softmax'"],
    ),
    ({**LINEAR, "window": 4}, {}, ["model.window=4", "model.kernel.form='linear'", "'softmax'"]),
    (
        LINEAR,
        {"objective": {"name": "block_diffusion"}},
        ["objective.name='block_diffusion'", "model.kernel.form='linear'", "'softmax'"],
    ),
    (
        {**LINEAR, "attention": "bidirectional"},
        {"objective": {"name": "diffusion"}, "generation": {"sampler": "blocks", "block_length": 4}},
        ["generation.sampler='blocks'", "denoise"],
    ),
    (
        {"attention_kind": "mla"},
        {"training": {"adapters": {"targets": "key_latent"}}},
        ["training.adapters.targets='key_latent'", "rotary_key"],
    ),
]


@pytest.mark.parametrize(("model", "sections", "words"), REFUSED)
def test_what_a_kind_cannot_do_is_refused_in_one_line(
    model: dict[str, Any], sections: dict[str, Any], words: list[str]
):
    with pytest.raises(UserError) as error:
        resolved(model, **sections)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("form", ["softmax", "linear"])
def test_what_both_forms_can_do_is_let_pass(form: str):
    """Only places can be windowed and read in blocks; prefixes, masks and packed rows are for both."""
    model = {"attention_kind": "mlgka", "attention": "bidirectional", "kernel": {"form": form}}
    for objective in ("mlm", "diffusion", "prefix"):
        assert resolved(model, objective={"name": objective}).model.kernel.form == form
    blocks = "blocks" in samplers(resolved(model, objective={"name": "diffusion"}))
    assert blocks is (form == "softmax")


def test_transformers_has_no_room_for_other_kinds_here():
    plain = resolved(families.llama("tiny")).model
    assert kinds.family_of(plain) == "llama"
    with pytest.raises(UserError, match=r"model\.attention_kind='mha', not 'mla'"):
        kinds.family_of(resolved({**families.llama("tiny"), "attention_kind": "mla"}).model)


def test_deepseek_v2_stores_nine_halves_of_a_heads_width():
    """Its table 1 (512 + 64 numbers a place, 9 / 2 of 128), and the weights of its attention by hand."""
    latent = {"kv_rank": 512, "query_rank": 1536, "d_rope": 64, "d_value": 128}
    shape = {"d_model": 5120, "n_heads": 128, "d_head": 128, "attention_kind": "mla", "latent": latent}
    model = resolved(shape).model
    by_hand = 5120 * 1536 + 1536 + 1536 * 128 * 192 + 5120 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 5120
    assert weights.count(weights.block_table(model)["attention"]) == by_hand == 149_227_520
    assert init_store(model, 1, 1, 2, dtype=jnp.bfloat16).entries.shape == (1, 1, 2, 9 * 128 // 2)

"""Tables of weights against the parameters drawn from them, and the sizes of the public families."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax import config as config_lib
from stackwise_jax.errors import UserError
from stackwise_jax.models import families, weights
from stackwise_jax.models.rack import count_parameters, init_rack
from stackwise_jax.schema import ModelConfig

FAMILIES: dict[str, Callable[[str], Any]] = {name: getattr(families, name) for name in families.SIZES}


def resolved(fields: dict[str, Any]) -> ModelConfig:
    """The way a config file takes a family over."""
    config = config_lib.default()
    config.model.update(fields)
    config.data.seq_len = 16
    if fields.get("attention") == "bidirectional":
        config.objective.name = "mlm"
    return config_lib.resolve(config).model


# Parameters by the formulas of the publications, in code that shares nothing with the package.
def bert_parameters(blocks: int, d: int, vocabulary: int = 30522, positions: int = 512) -> int:
    block = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 4 * d
    head = d * d + d + 2 * d + vocabulary
    return (vocabulary + positions + 2) * d + 2 * d + blocks * block + head


def modernbert_parameters(blocks: int, d: int, hidden: int, vocabulary: int = 50368) -> int:
    block = 4 * d * d + 3 * d * hidden + 2 * d
    return vocabulary * d + d + blocks * block - d + d + (d * d + d) + vocabulary


def gpt2_parameters(blocks: int, d: int) -> int:
    return (50257 + 1024) * d + blocks * (12 * d * d + 13 * d) + 2 * d


def llama_parameters(blocks: int, d: int, hidden: int, vocabulary: int = 32000) -> int:
    return 2 * vocabulary * d + blocks * (4 * d * d + 3 * d * hidden + 2 * d) + d


# Published counts. BERT: BertForPreTraining of bert-base-uncased and bert-large-uncased on the hub (110,106,428 and
# 336,226,108), less the pooler and the head of the next sentence; small ones by formula, see the next test. ModernBERT:
# answerdotai/ModernBERT-base and -large on the hub; Ettin's (17M, 32M, 68M, 1B) by formula. GPT-2 and LLaMA: gpt2..,
# Llama-2.., Meta-Llama-3-8B, Llama-3.1.. and Llama-3.2.. on the hub; shapes that were never published by formula.
# tests/reference counts all of them again with transformers.
@pytest.mark.parametrize(
    ("family", "size", "parameters"),
    [
        ("bert", "tiny", bert_parameters(2, 128)),
        ("bert", "mini", bert_parameters(4, 256)),
        ("bert", "small", bert_parameters(4, 512)),
        ("bert", "medium", bert_parameters(8, 512)),
        ("bert", "base", 110_106_428 - (768 * 768 + 768) - (2 * 768 + 2)),
        ("bert", "large", 336_226_108 - (1024 * 1024 + 1024) - (2 * 1024 + 2)),
        ("modernbert", "tiny", modernbert_parameters(7, 256, 384)),
        ("modernbert", "mini", modernbert_parameters(10, 384, 576)),
        ("modernbert", "small", modernbert_parameters(19, 512, 768)),
        ("modernbert", "base", 149_655_232),
        ("modernbert", "large", 395_881_664),
        ("modernbert", "xl", modernbert_parameters(28, 1792, 3840)),
        ("gpt2", "nano", gpt2_parameters(3, 48)),
        ("gpt2", "small", 124_439_808),
        ("gpt2", "medium", 354_823_168),
        ("gpt2", "large", 774_030_080),
        ("gpt2", "xl", 1_557_611_200),
        ("llama", "tiny", llama_parameters(6, 288, 768)),
        ("llama", "small", llama_parameters(12, 768, 2048)),
        ("llama", "1b", 1_235_814_400),
        ("llama", "3b", 3_212_749_824),
        ("llama", "7b", 6_738_415_616),
        ("llama", "8b", 8_030_261_248),
        ("llama", "8b-3.1", 8_030_261_248),
        ("llama", "13b", 13_015_864_320),
        ("llama", "70b", 68_976_648_192),
        ("llama", "70b-3.1", 70_553_706_496),
    ],
)
def test_families_have_the_published_parameters(family: str, size: str, parameters: int):
    model = resolved(FAMILIES[family](size))
    assert count_parameters(model) == parameters
    assert model.architecture.blocks_per_stack == 1


def test_small_sizes_have_the_parameters_that_their_papers_round():
    """In millions, as printed; Turc et al. count the pooler."""
    printed = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base": 110.1}
    for size, (_, d, _) in families.BERT_SIZES.items():
        if size in printed:
            with_pooler = count_parameters(resolved(families.bert(size))) + d * d + d
            assert round(with_pooler / 1e6, 1) == printed[size]
    for size, millions in {"tiny": 17, "mini": 32, "small": 68, "xl": 1028}.items():
        assert abs(count_parameters(resolved(families.modernbert(size))) / 1e6 - millions) < 4


def test_families_list_their_sizes():
    assert list(families.BERT_SIZES) == ["tiny", "mini", "small", "medium", "base", "large"]
    assert list(families.MODERNBERT_SIZES) == ["tiny", "mini", "small", "base", "large", "xl"]
    assert list(families.GPT2_SIZES) == ["nano", "small", "medium", "large", "xl"]
    llamas = ["tiny", "small", "1b", "3b", "7b", "8b", "8b-3.1", "13b", "70b", "70b-3.1"]
    assert list(families.LLAMA_SIZES) == llamas


@pytest.mark.parametrize("family", FAMILIES.values())
def test_unknown_sizes_are_refused(family: Callable[[str], Any]):
    with pytest.raises(UserError, match="must be one of: "):
        family("huge")


def test_unknown_sizes_are_refused_with_a_hint():
    with pytest.raises(UserError, match='Did you mean "medium"'):
        families.gpt2("meduim")


SMALL = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
VARIANTS: list[dict[str, Any]] = [
    SMALL,
    {**SMALL, "norm": "layernorm", "ffn": "gelu", "positions": "learned", "use_bias": True, "ties_embedding": True},
    {**SMALL, "norm_position": "post", "embedding_norm": True, "ties_embedding": True, "ffn": "geglu"},
    {**SMALL, "stability": {"residual_gain": 0.25}},
    {**SMALL, "attention_kind": "mla", "use_bias": True, "latent": {"query_rank": 6, "d_rope": 2, "d_value": 3}},
    {**SMALL, "attention_kind": "mla", "latent": {"form": "separate", "kv_rank": 5}},
    {**SMALL, "attention_kind": "mlgka", "positions": "learned", "kernel": {"form": "linear"}},
    {**SMALL, "time_input": True},
    {**SMALL, "time_input": True, "norm_position": "post", "ties_embedding": True},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_what_is_drawn_is_what_the_table_says(fields: dict[str, Any]):
    model = resolved(fields)
    rack = jax.eval_shape(lambda: init_rack(jax.random.key(0), model, (1, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(rack)) == count_parameters(model)
    own = jax.tree.map(lambda leaf: leaf.shape[1:], rack["stacks"][1], is_leaf=lambda leaf: hasattr(leaf, "shape"))
    table = jax.tree.map(lambda w: w.shape, weights.block_table(model), is_leaf=weights.is_weight)
    assert own == table
    for weight in jax.tree.leaves(weights.block_table(model), is_leaf=weights.is_weight):
        assert len(weight.axes) == len(weight.shape)


def test_initial_values_follow_the_table():
    table = {
        "scale": weights.Weight((64,), ("D",), "ones"),
        "bias": weights.Weight((64,), ("D",), "zeros"),
        "kernel": weights.Weight((64, 64), ("D", "F"), std=0.5),
        "gain": weights.Weight((), (), "constant", value=0.25),
    }
    drawn = weights.init_weights(jax.random.key(0), table)
    np.testing.assert_array_equal(drawn["scale"], 1.0)
    np.testing.assert_array_equal(drawn["bias"], 0.0)
    np.testing.assert_array_equal(drawn["gain"], np.float32(0.25))
    assert float(jnp.std(drawn["kernel"])) == pytest.approx(0.5, rel=0.05)
    assert abs(float(jnp.mean(drawn["kernel"]))) < 0.05
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(drawn))


def test_a_weight_is_drawn_from_its_own_name():
    kernel = weights.Weight((4, 4), ("D", "F"), std=1.0)
    alone = weights.init_weights(jax.random.key(0), {"b": {"kernel": kernel}})
    beside = weights.init_weights(jax.random.key(0), {"a": {"kernel": kernel}, "b": {"kernel": kernel}})
    np.testing.assert_array_equal(alone["b"]["kernel"], beside["b"]["kernel"])
    assert not np.array_equal(beside["a"]["kernel"], beside["b"]["kernel"])


def test_maps_onto_the_residual_stream_start_smaller():
    table = weights.block_table(resolved({**SMALL, "architecture": {"n_stacks": 4, "blocks_per_stack": 2}}))
    assert table["mlp"]["up"]["kernel"].std == 0.02
    assert table["mlp"]["down"]["kernel"].std == pytest.approx(0.02 / 4)
    assert table["attention"]["output"]["kernel"].std == pytest.approx(0.02 / 4)


def test_a_tied_post_norm_head_is_empty():
    model = resolved({**SMALL, "norm_position": "post", "ties_embedding": True})
    assert weights.head_table(model, tied=True) == {}
    assert set(weights.head_table(model, tied=False)) == {"table"}

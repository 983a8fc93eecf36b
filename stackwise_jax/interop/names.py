"""What an array of a rack is called in Hugging Face's `transformers`, and how it lies there.

One table a family and part. A matrix of theirs is the transpose of ours, unless they say otherwise (GPT-2), and may be
several of ours side by side (queries, keys and values). Tables list what a family may have; what a model has is told by
its table of weights.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from stackwise_jax.models import weights
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Params

HostArray = Shaped[np.ndarray, "..."]
Read = Callable[[str], HostArray]
"""An array of theirs by its name."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of theirs.

    Attributes:
      theirs: its name; of a block, with "{block}" for the block's number.
      ours: names of the arrays that it holds, side by side along their last axis.
      transposed: it is the transpose of that.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def _array(theirs: str, ours: str) -> list[Entry]:
    return [Entry(theirs, (ours,))]


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.weight", (f"{ours}/scale",)), Entry(f"{theirs}.bias", (f"{ours}/bias",))]


def _linear(theirs: str, *ours: str, transposed: bool = True) -> list[Entry]:
    kernels, biases = tuple(f"{name}/kernel" for name in ours), tuple(f"{name}/bias" for name in ours)
    return [Entry(f"{theirs}.weight", kernels, transposed), Entry(f"{theirs}.bias", biases)]


def _conv(theirs: str, *ours: str) -> list[Entry]:
    """GPT-2 keeps its matrices as we do."""
    return _linear(theirs, *ours, transposed=False)


# BERT's bias of logits, and the name that is read instead where the table is not tied.
BERT_BIAS, BERT_BIAS_UNTIED = "cls.predictions.bias", "cls.predictions.decoder.bias"
QUERY_KEY_VALUE = ("attention/query", "attention/key", "attention/value")
_BERT = "bert.encoder.layer.{block}."
_MODERNBERT = "model.layers.{block}."
_GPT2 = "transformer.h.{block}."
_LLAMA = "model.layers.{block}."

TABLES: dict[str, dict[str, list[Entry]]] = {
    "bert": {
        "embedding": [
            *_array("bert.embeddings.word_embeddings.weight", "tokens"),
            *_array("bert.embeddings.position_embeddings.weight", "positions"),
            *_array("bert.embeddings.token_type_embeddings.weight", "token_types"),
            *_norm("bert.embeddings.LayerNorm", "norm"),
        ],
        "block": [
            *_linear(_BERT + "attention.self.query", "attention/query"),
            *_linear(_BERT + "attention.self.key", "attention/key"),
            *_linear(_BERT + "attention.self.value", "attention/value"),
            *_linear(_BERT + "attention.output.dense", "attention/output"),
            *_norm(_BERT + "attention.output.LayerNorm", "attention_norm"),
            *_linear(_BERT + "intermediate.dense", "mlp/up"),
            *_linear(_BERT + "output.dense", "mlp/down"),
            *_norm(_BERT + "output.LayerNorm", "mlp_norm"),
        ],
        "head": [
            *_linear("cls.predictions.transform.dense", "transform"),
            *_norm("cls.predictions.transform.LayerNorm", "transform_norm"),
            *_array("cls.predictions.decoder.weight", "table"),
            *_array(BERT_BIAS, "logit_bias"),
        ],
    },
    "modernbert": {
        "embedding": [
            *_array("model.embeddings.tok_embeddings.weight", "tokens"),
            *_norm("model.embeddings.norm", "norm"),
        ],
        "block": [
            *_norm(_MODERNBERT + "attn_norm", "attention_norm"),
            *_linear(_MODERNBERT + "attn.Wqkv", *QUERY_KEY_VALUE),
            *_linear(_MODERNBERT + "attn.Wo", "attention/output"),
            *_norm(_MODERNBERT + "mlp_norm", "mlp_norm"),
            *_linear(_MODERNBERT + "mlp.Wi", "mlp/gate", "mlp/up"),
            *_linear(_MODERNBERT + "mlp.Wo", "mlp/down"),
        ],
        "head": [
            *_norm("model.final_norm", "norm"),
            *_linear("head.dense", "transform"),
            *_norm("head.norm", "transform_norm"),
            *_array("decoder.weight", "table"),
            *_array("decoder.bias", "logit_bias"),
        ],
    },
    "gpt2": {
        "embedding": [
            *_array("transformer.wte.weight", "tokens"),
            *_array("transformer.wpe.weight", "positions"),
        ],
        "block": [
            *_norm(_GPT2 + "ln_1", "attention_norm"),
            *_conv(_GPT2 + "attn.c_attn", *QUERY_KEY_VALUE),
            *_conv(_GPT2 + "attn.c_proj", "attention/output"),
            *_norm(_GPT2 + "ln_2", "mlp_norm"),
            *_conv(_GPT2 + "mlp.c_fc", "mlp/up"),
            *_conv(_GPT2 + "mlp.c_proj", "mlp/down"),
        ],
        "head": [*_norm("transformer.ln_f", "norm"), *_array("lm_head.weight", "table")],
    },
    "llama": {
        "embedding": _array("model.embed_tokens.weight", "tokens"),
        "block": [
            *_norm(_LLAMA + "input_layernorm", "attention_norm"),
            *_linear(_LLAMA + "self_attn.q_proj", "attention/query"),
            *_linear(_LLAMA + "self_attn.k_proj", "attention/key"),
            *_linear(_LLAMA + "self_attn.v_proj", "attention/value"),
            *_linear(_LLAMA + "self_attn.o_proj", "attention/output"),
            *_norm(_LLAMA + "post_attention_layernorm", "mlp_norm"),
            *_linear(_LLAMA + "mlp.gate_proj", "mlp/gate"),
            *_linear(_LLAMA + "mlp.up_proj", "mlp/up"),
            *_linear(_LLAMA + "mlp.down_proj", "mlp/down"),
        ],
        "head": [*_norm("model.norm", "norm"), *_array("lm_head.weight", "table")],
    },
}


def part_table(model: ModelConfig, part: str) -> dict[str, weights.Weight]:
    """Our weights of a part ("embedding", "block", "head") by name, facts about blocks left out."""
    table = {
        "embedding": lambda: weights.embedding_table(model),
        "block": lambda: weights.block_table(model),
        "head": lambda: weights.head_table(model, tied=model.ties_embedding),
    }[part]()
    leaves = jax.tree_util.tree_leaves_with_path(table, is_leaf=weights.is_weight)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): weight for path, weight in leaves}
    return {name: weight for name, weight in named.items() if weight.init != "place"}


def part_entries(family: str, model: ModelConfig, part: str, block: int = 0) -> list[Entry]:
    """The entries of a part of a model, with the number of the block in their names.

    Raises:
      ValueError: the family has no name for one of our arrays.
    """
    table = part_table(model, part)
    entries = [entry for entry in TABLES[family][part] if entry.ours[0] in table]
    unnamed = set(table) - {name for entry in entries for name in entry.ours}
    if unnamed:
        raise ValueError(f"{family} has no name for {sorted(unnamed)} of the {part}")
    names = {} if model.ties_embedding else {BERT_BIAS: BERT_BIAS_UNTIED}
    return [
        dataclasses.replace(entry, theirs=names.get(entry.theirs, entry.theirs).format(block=block))
        for entry in entries
        if not (part == "block" and _is_unused(model, block, entry.ours[0]))
    ]


def _is_unused(model: ModelConfig, block: int, name: str) -> bool:
    """A norm that the first block has among its weights, so that all blocks are alike, and never reads."""
    return block == 0 and not model.first_attention_norm and name.startswith("attention_norm/")


def from_theirs(family: str, model: ModelConfig, part: str, read: Read, block: int = 0) -> Params:
    """A part of a rack out of arrays of theirs, in their dtype; of a block, without the leading block axis.

    Raises:
      ValueError: an array has another shape than the model says.
    """
    table = part_table(model, part)
    flat: dict[str, Any] = {}
    for entry in part_entries(family, model, part, block):
        array = read(entry.theirs)
        widths = [table[name].shape[-1] for name in entry.ours]
        expected = (*table[entry.ours[0]].shape[:-1], sum(widths))
        if array.shape != (expected[::-1] if entry.transposed else expected):
            raise ValueError(f"{entry.theirs} has shape {list(array.shape)}, and the config asks for another")
        array = array.T if entry.transposed else array
        pieces = np.split(array, np.cumsum(widths)[:-1], axis=-1)
        flat |= {name: np.ascontiguousarray(piece) for name, piece in zip(entry.ours, pieces, strict=True)}
    if part == "block":
        ones = {name: np.ones(table[name].shape, np.float32) for name in table if _is_unused(model, block, name)}
        flat |= ones | {name: np.asarray(fact) for name, fact in weights.block_facts(model, block).items()}
    return nest(flat)


def to_theirs(
    family: str, model: ModelConfig, part: str, params: Params, block: int = 0
) -> Iterator[tuple[str, HostArray]]:
    """(name, array) of theirs for a part of a rack; the inverse of `from_theirs`."""
    for entry in part_entries(family, model, part, block):
        joined = np.concatenate([np.asarray(leaf_of(params, name)) for name in entry.ours], axis=-1)
        yield entry.theirs, np.ascontiguousarray(joined.T if entry.transposed else joined)


def leaf_of(params: Params, name: str) -> Any:
    """The array that a name like "attention/query/kernel" stands for."""
    node: Any = params
    for key in name.split("/"):
        node = node[key]
    return node


def nest(flat: dict[str, Any]) -> Params:
    """{"a/b": x} to {"a": {"b": x}}."""
    nested: Params = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = nested
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return nested

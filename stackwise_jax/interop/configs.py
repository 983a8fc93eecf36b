"""`config.json` of Hugging Face's `transformers` and our `ModelConfig`, both ways, for BERT, ModernBERT, GPT-2, LLaMA.

What a config asks for and we lack is refused by name. Both the names of `transformers` 4 and those of 5 are read, and
both are written where they differ.
"""

from collections.abc import Mapping
from typing import Any

from stackwise_jax.errors import UserError
from stackwise_jax.interop.kinds import ARCHITECTURES, FAMILIES
from stackwise_jax.schema import ModelConfig, RopeScalingConfig

Json = Mapping[str, Any]

_GELU_ERF, _GELU_TANH = ("gelu", "gelu_python"), ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def to_model(theirs: Json) -> tuple[str, dict[str, Any]]:
    """(family, fields of `ModelConfig`, sections as dicts of their own) that a `config.json` stands for.

    Raises:
      UserError: another family, a missing entry, or something that we lack.
    """
    family = theirs.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"config.json: model_type={family!r} must be one of: {', '.join(FAMILIES)}")
    fields = {name: value[0] if isinstance(value, tuple) else value for name, value in FAMILIES[family].items()}
    read = {"bert": _read_bert, "modernbert": _read_modernbert, "gpt2": _read_gpt2, "llama": _read_llama}[family]
    try:
        fields |= read(theirs)
    except KeyError as error:
        raise UserError(f"config.json of a {family} lacks {error.args[0]!r}") from None
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json of a {family} has an entry of another type than it should: {error}") from None
    if not isinstance(fields["max_positions"], int):
        raise UserError(f"config.json of a {family} gives {fields['max_positions']!r} positions; it must be a number")
    n_blocks = fields.pop("n_blocks")
    return family, fields | {"architecture": {"n_stacks": n_blocks, "blocks_per_stack": 1}}


def _refuse(theirs: Json, **needed: Any) -> None:
    """Entries that, where they stand, must have the value that we have."""
    for name, value in needed.items():
        if name in theirs and theirs[name] != value:
            raise UserError(f"config.json: {name}={theirs[name]!r} is not supported, only {value!r}")


def _activation(name: str, *, gated: bool) -> str:
    kind = {**dict.fromkeys(_GELU_ERF, "gelu_erf"), **dict.fromkeys(_GELU_TANH, "gelu")}.get(name)
    if kind is None:
        raise UserError(f"config.json: activation {name!r} must be one of: {', '.join(_GELU_ERF + _GELU_TANH)}")
    return kind.replace("gelu", "geglu") if gated else kind


def _read_bert(theirs: Json) -> dict[str, Any]:
    _refuse(theirs, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return {
        "n_blocks": theirs["num_hidden_layers"],
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "n_heads": theirs["num_attention_heads"],
        "d_ff": theirs["intermediate_size"],
        "max_positions": theirs["max_position_embeddings"],
        "token_types": theirs.get("type_vocab_size", 2),
        "norm_epsilon": theirs.get("layer_norm_eps", 1e-12),
        "ffn": _activation(theirs.get("hidden_act", "gelu"), gated=False),
        "dropout": float(theirs.get("hidden_dropout_prob", 0.1)),
        "init_std": theirs.get("initializer_range", 0.02),
        "ties_embedding": theirs.get("tie_word_embeddings", True),
    }


def _read_gpt2(theirs: Json) -> dict[str, Any]:
    _refuse(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width = theirs["n_embd"]
    return {
        "n_blocks": theirs["n_layer"],
        "vocab_size": theirs["vocab_size"],
        "d_model": width,
        "n_heads": theirs["n_head"],
        "d_ff": theirs.get("n_inner") or 4 * width,
        "max_positions": theirs.get("n_positions", 1024),
        "norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "ffn": _activation(theirs.get("activation_function", "gelu_new"), gated=False),
        "dropout": float(theirs.get("resid_pdrop", 0.1)),
        "init_std": theirs.get("initializer_range", 0.02),
        "ties_embedding": theirs.get("tie_word_embeddings", True),
    }


def _read_llama(theirs: Json) -> dict[str, Any]:
    _refuse(theirs, hidden_act="silu")
    has_bias = theirs.get("attention_bias", False)
    if theirs.get("mlp_bias", False) != has_bias:
        raise UserError("config.json: attention_bias and mlp_bias must be equal; a model has biases or none")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    return {
        "n_blocks": theirs["num_hidden_layers"],
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "n_heads": theirs["num_attention_heads"],
        "n_kv_heads": theirs.get("num_key_value_heads"),
        "d_head": theirs.get("head_dim"),
        "d_ff": theirs["intermediate_size"],
        "max_positions": theirs.get("max_position_embeddings", 2048),
        "norm_epsilon": theirs.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or theirs.get("rope_theta", 10_000.0)),
        "rope_scaling": _read_scaling(rope),
        "use_bias": has_bias,
        "init_std": theirs.get("initializer_range", 0.02),
        "ties_embedding": theirs.get("tie_word_embeddings", False),
    }


def _read_scaling(rope: Json) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"kind": "none"}
    if kind == "linear":
        return {"kind": "linear", "factor": float(rope["factor"])}
    if kind != "llama3":
        raise UserError(f"config.json: rope_type={kind!r} must be one of: default, linear, llama3")
    return {
        "kind": "llama3",
        "factor": float(rope["factor"]),
        "low_frequency_factor": float(rope["low_freq_factor"]),
        "high_frequency_factor": float(rope["high_freq_factor"]),
        "original_positions": rope["original_max_position_embeddings"],
    }


def _read_modernbert(theirs: Json) -> dict[str, Any]:
    _refuse(theirs, attention_bias=False, mlp_bias=False, classifier_bias=False, decoder_bias=True)
    activation = theirs.get("hidden_activation", "gelu")
    _refuse(theirs, classifier_activation=activation)
    n_blocks, rope = theirs["num_hidden_layers"], theirs.get("rope_parameters") or {}
    whole, local = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    for own in (whole, local):
        if _read_scaling(own)["kind"] != "none":
            raise UserError("config.json: rope_type of a ModernBERT must be 'default'")
    theta = float(whole.get("rope_theta") or theirs.get("global_rope_theta", 160_000.0))
    theta_local = float(local.get("rope_theta") or theirs.get("local_rope_theta") or 10_000.0)
    every = _global_every(theirs, n_blocks)
    return {
        "n_blocks": n_blocks,
        "vocab_size": theirs["vocab_size"],
        "d_model": theirs["hidden_size"],
        "n_heads": theirs["num_attention_heads"],
        "d_ff": theirs["intermediate_size"],
        "max_positions": theirs.get("max_position_embeddings", 8192),
        "norm_epsilon": theirs.get("norm_eps", 1e-5),
        "norm_bias": theirs.get("norm_bias", False),
        "ffn": _activation(activation, gated=True),
        "rope_theta": theta_local if every is None else theta,
        "rope_theta_local": theta_local if every is not None and every > 1 else None,
        "window": theirs.get("local_attention", 128) // 2 if every != 1 else None,
        "global_every": every if every != 1 else None,
        "dropout": float(theirs.get("mlp_dropout", 0.0)),
        "init_std": theirs.get("initializer_range", 0.02),
        "ties_embedding": theirs.get("tie_word_embeddings", True),
    }


def _global_every(theirs: Json, n_blocks: int) -> int | None:
    """Every how many blocks one reaches all places, 1 for all; None: none does."""
    kinds = theirs.get("layer_types")
    if kinds is None:
        return theirs.get("global_attn_every_n_layers", 3)
    is_global = [kind == "full_attention" for kind in kinds]
    if not any(is_global):
        return None
    for every in range(1, n_blocks + 1):
        if is_global == [block % every == 0 for block in range(n_blocks)]:
            return every
    raise UserError("config.json: layer_types must be full_attention in every n-th block, from the first on")


def to_theirs(family: str, model: ModelConfig, *, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
      family: of `kinds.family_of`.
      dtype: of its arrays, as torch calls it.
      ids: of special tokens: "pad_token_id", "bos_token_id", .. as far as there are any.
    """
    write = {"bert": _write_bert, "modernbert": _write_modernbert, "gpt2": _write_gpt2, "llama": _write_llama}[family]
    common = {
        "model_type": family,
        "architectures": [ARCHITECTURES[family]],
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.ties_embedding,
    }
    return common | write(model) | dict.fromkeys(TOKEN_IDS) | dict(ids)


TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def _activation_name(model: ModelConfig) -> str:
    return "gelu" if model.ffn.endswith("_erf") else "gelu_pytorch_tanh"


def _write_bert(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": model.n_blocks,
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": _activation_name(model),
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_layer": model.n_blocks,
        "n_embd": model.d_model,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": _activation_name(model).replace("gelu_pytorch_tanh", "gelu_new"),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": 0.0,
    }


def _write_llama(model: ModelConfig) -> dict[str, Any]:
    scaling = _write_scaling(model.rope_scaling)
    return {
        "num_hidden_layers": model.n_blocks,
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "rope_parameters": scaling | {"rope_theta": model.rope_theta},
        "hidden_act": "silu",
        "attention_bias": model.use_bias,
        "mlp_bias": model.use_bias,
    }


def _write_scaling(scaling: RopeScalingConfig) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def _write_modernbert(model: ModelConfig) -> dict[str, Any]:
    every = 1 if model.window is None else model.global_every
    is_global = [every is not None and block % every == 0 for block in range(model.n_blocks)]
    theta_local = model.rope_theta_local or model.rope_theta
    return {
        "num_hidden_layers": model.n_blocks,
        "hidden_size": model.d_model,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_positions,
        "norm_eps": model.norm_epsilon,
        "norm_bias": model.norm_bias,
        "hidden_activation": _activation_name(model),
        "classifier_activation": _activation_name(model),
        "local_attention": 2 * (model.window or 64),
        "layer_types": ["full_attention" if whole else "sliding_attention" for whole in is_global],
        "global_attn_every_n_layers": every or model.n_blocks,
        "global_rope_theta": model.rope_theta,
        "local_rope_theta": theta_local,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": theta_local},
        },
        "mlp_dropout": model.dropout,
        "attention_dropout": 0.0,
        "embedding_dropout": model.dropout,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_bias": False,
        "decoder_bias": True,
    }

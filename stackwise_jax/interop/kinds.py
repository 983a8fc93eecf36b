"""Which family of `transformers` has room for a model of ours: the choices that all models of a family share."""

from typing import Any

from stackwise_jax.errors import UserError
from stackwise_jax.schema import ModelConfig

ARCHITECTURES = {
    "bert": "BertForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
}

# What every model of a family has in common; a tuple lists what it may have.
_PLAIN: dict[str, Any] = {
    "d_embedding": None,
    "attention_kind": "mha",
    "first_attention_norm": True,
    "token_types": 0,
    "embedding_norm": False,
    "head_transform": False,
    "logit_bias": False,
    "window": None,
    "global_every": None,
    "rope_theta_local": None,
    "time_input": False,
    "causal_from": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": _PLAIN
    | {
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "post",
        "ffn": ("gelu_erf", "gelu"),
        "positions": "learned",
        "embedding_norm": True,
        "use_bias": True,
        "head_transform": True,
        "logit_bias": True,
        "attention": "bidirectional",
    },
    "modernbert": _PLAIN
    | {
        "norm": "layernorm",
        "norm_bias": (False, True),
        "norm_position": "pre",
        "first_attention_norm": False,
        "ffn": ("geglu_erf", "geglu"),
        "positions": "rotary",
        "embedding_norm": True,
        "use_bias": False,
        "head_transform": True,
        "logit_bias": True,
        "attention": "bidirectional",
    },
    "gpt2": _PLAIN
    | {
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "pre",
        "ffn": ("gelu", "gelu_erf"),
        "positions": "learned",
        "use_bias": True,
        "attention": "causal",
    },
    "llama": _PLAIN
    | {
        "norm": "rmsnorm",
        "norm_position": "pre",
        "ffn": "swiglu",
        "positions": "rotary",
        "use_bias": (False, True),
        "attention": "causal",
    },
}
# Fields in which sizes of a family differ, and which others it may therefore set as it likes.
_FREE = {
    "bert": ("token_types",),
    "modernbert": ("window", "global_every", "rope_theta_local"),
    "gpt2": (),
    "llama": (),
}


def family_of(model: ModelConfig) -> str:
    """The family that has room for a model.

    Raises:
      UserError: none has; names what keeps it out of the one that is nearest.
    """
    complaints = {family: _complaints(family, model) for family in FAMILIES}
    family = min(complaints, key=lambda name: len(complaints[name]))
    if complaints[family]:
        raise UserError(
            f"no family of transformers has room for this model; nearest is {family}, which needs "
            + ", ".join(complaints[family])
        )
    return family


def _complaints(family: str, model: ModelConfig) -> list[str]:
    found = []
    for field, wanted in FAMILIES[family].items():
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        value = getattr(model, field)
        if field not in _FREE[family] and value not in allowed:
            found.append(f"model.{field}={' or '.join(map(repr, allowed))}, not {value!r}")
    if model.has_experts:
        found.append("model.experts.count=0")
    if model.stability.residual_gain is not None:
        found.append("model.stability.residual_gain=None")
    if family != "llama" and (model.n_kv_heads or model.n_heads) != model.n_heads:
        found.append(f"model.n_kv_heads={model.n_heads}, not {model.n_kv_heads}")
    if family != "llama" and (model.d_head or 0) * model.n_heads not in (0, model.d_model):
        found.append(f"model.d_head={model.d_model // model.n_heads}, not {model.d_head}")
    if family not in ("llama", "modernbert") and model.rope_scaling.kind != "none":
        found.append("model.rope_scaling.kind='none'")
    return found

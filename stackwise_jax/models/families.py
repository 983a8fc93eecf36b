"""The public families as tables of sizes: the `ModelConfig` fields in which a model differs from the defaults.

A config takes one over by `config.model.update(families.gpt2("small"))`; every size comes as stacks of one block. They
are the families as published, with their language-model heads: `tests/reference` compares them with `transformers`.
Nothing heavy is imported.
"""

from typing import Any

from stackwise_jax.errors import UserError, did_you_mean

# Blocks, width, heads. Hidden width is four times the width. Base and large: Devlin et al. (2019); Turc et al. (2019).
BERT_SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
# Blocks, width, heads, hidden width. Base and large: Warner et al. (2024). The others are the shapes of Ettin (Weller
# et al., 2025: 17M, 32M, 68M and 1B), which has this architecture.
MODERNBERT_SIZES = {
    "tiny": (7, 256, 4, 384),
    "mini": (10, 384, 6, 576),
    "small": (19, 512, 8, 768),
    "base": (22, 768, 12, 1152),
    "large": (28, 1024, 16, 2624),
    "xl": (28, 1792, 28, 3840),
}
# Radford et al. (2019); nano is the smallest shape of minGPT.
GPT2_SIZES = {
    "nano": (3, 48, 3),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
# Blocks, width, heads, key-value heads, hidden width, and which LLaMA it is. Tiny and small are shapes of llama2.c.
LLAMA_SIZES = {
    "tiny": (6, 288, 6, 6, 768, "2"),
    "small": (12, 768, 12, 12, 2048, "2"),
    "1b": (16, 2048, 32, 8, 8192, "3.2"),
    "3b": (28, 3072, 24, 8, 8192, "3.2"),
    "7b": (32, 4096, 32, 32, 11008, "2"),
    "8b": (32, 4096, 32, 8, 14336, "3"),
    "8b-3.1": (32, 4096, 32, 8, 14336, "3.1"),
    "13b": (40, 5120, 40, 40, 13824, "2"),
    "70b": (80, 8192, 64, 8, 28672, "2"),
    "70b-3.1": (80, 8192, 64, 8, 28672, "3.1"),
}
_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500_000.0}
_SCALING = {"kind": "llama3", "low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_positions": 8192}
LLAMA_VERSIONS: dict[str, dict[str, Any]] = {
    "2": {"vocab_size": 32000, "rope_theta": 10_000.0, "max_positions": 4096},
    "3": {**_LLAMA3, "max_positions": 8192},
    "3.1": {**_LLAMA3, "max_positions": 131_072, "rope_scaling": {**_SCALING, "factor": 8.0}},
    "3.2": {
        **_LLAMA3,
        "max_positions": 131_072,
        "rope_scaling": {**_SCALING, "factor": 32.0},
        "ties_embedding": True,
    },
}
SIZES = {"bert": BERT_SIZES, "modernbert": MODERNBERT_SIZES, "gpt2": GPT2_SIZES, "llama": LLAMA_SIZES}


def bert(size: str) -> dict[str, Any]:
    """An encoder of Devlin et al. (2019), or a small one of Turc et al. (2019), with the head of masked tokens.

    Left out are the pooler and the head of the next sentence, of a task that we have no objective for.

    Args:
      size: tiny, mini, small, medium, base or large.

    Returns:
      fields of `ModelConfig`, sections as dicts of their own; train them with `objective.name="mlm"`.

    Raises:
      UserError: an unknown size.
    """
    n_blocks, d_model, n_heads = _sizes_of("bert", BERT_SIZES, size)
    return {
        "vocab_size": 30522,
        "d_model": d_model,
        "n_heads": n_heads,
        "d_ff": 4 * d_model,
        "norm": "layernorm",
        "norm_position": "post",
        "norm_epsilon": 1e-12,
        "ffn": "gelu_erf",
        "positions": "learned",
        "max_positions": 512,
        "token_types": 2,
        "embedding_norm": True,
        "use_bias": True,
        "ties_embedding": True,
        "head_transform": True,
        "logit_bias": True,
        "dropout": 0.1,
        "attention": "bidirectional",
        "architecture": _one_block_stacks(n_blocks),
    }


def modernbert(size: str) -> dict[str, Any]:
    """An encoder of Warner et al. (2024): every third block attends to all places, the others 64 to either side.

    Args:
      size: tiny, mini, small, base, large or xl.

    Returns:
      fields of `ModelConfig`, sections as dicts of their own; train them with `objective.name="mlm"` (at 30 percent, as
      published).

    Raises:
      UserError: an unknown size.
    """
    n_blocks, d_model, n_heads, d_ff = _sizes_of("modernbert", MODERNBERT_SIZES, size)
    return {
        "vocab_size": 50368,
        "d_model": d_model,
        "n_heads": n_heads,
        "d_ff": d_ff,
        "norm": "layernorm",
        "norm_bias": False,
        "first_attention_norm": False,
        "ffn": "geglu_erf",
        "rope_theta": 160_000.0,
        "rope_theta_local": 10_000.0,
        "max_positions": 8192,
        "window": 64,
        "global_every": 3,
        "embedding_norm": True,
        "ties_embedding": True,
        "head_transform": True,
        "logit_bias": True,
        "attention": "bidirectional",
        "architecture": _one_block_stacks(n_blocks),
    }


def gpt2(size: str) -> dict[str, Any]:
    """A decoder of Radford et al. (2019).

    GELU is the tanh form, as published. Dropout is 0, as is usual where no row is seen twice (0.1 as published).

    Args:
      size: nano, small, medium, large or xl.

    Returns:
      fields of `ModelConfig`, `architecture` as a dict of its own.

    Raises:
      UserError: an unknown size.
    """
    n_blocks, d_model, n_heads = _sizes_of("gpt2", GPT2_SIZES, size)
    return {
        "vocab_size": 50257,
        "d_model": d_model,
        "n_heads": n_heads,
        "d_ff": 4 * d_model,
        "norm": "layernorm",
        "ffn": "gelu",
        "positions": "learned",
        "max_positions": 1024,
        "use_bias": True,
        "ties_embedding": True,
        "architecture": _one_block_stacks(n_blocks),
    }


def llama(size: str) -> dict[str, Any]:
    """A decoder of LLaMA 2 (Touvron et al., 2023) or LLaMA 3, 3.1 or 3.2 (Grattafiori et al., 2024).

    "70b" is the shape of LLaMA 2: 68.98B parameters with the vocabulary of 32000.

    Args:
      size: tiny, small, 1b, 3b, 7b, 8b, 8b-3.1, 13b, 70b or 70b-3.1.

    Returns:
      fields of `ModelConfig`, sections as dicts of their own.

    Raises:
      UserError: an unknown size.
    """
    n_blocks, d_model, n_heads, n_kv_heads, d_ff, version = _sizes_of("llama", LLAMA_SIZES, size)
    return {
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_ff": d_ff,
        **LLAMA_VERSIONS[version],
        "architecture": _one_block_stacks(n_blocks),
    }


def _one_block_stacks(n_blocks: int) -> dict[str, int]:
    return {"n_stacks": n_blocks, "blocks_per_stack": 1}


def _sizes_of(family: str, sizes: dict[str, Any], size: str) -> Any:
    if size not in sizes:
        names = ", ".join(sizes)
        raise UserError(f"{family} size {size!r} must be one of: {names}.{did_you_mean(str(size), sizes)}")
    return sizes[size]

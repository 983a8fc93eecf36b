"""The public families as tables of sizes: the `ModelConfig` fields in which a model differs from the defaults.

A config takes one over by `config.model.update(families.gpt2("small"))`; every size comes as stacks of one block. What
a family publishes and this model has no field for is said in its docstring. Nothing heavy is imported.
"""

from typing import Any

from stackwise_jax.errors import UserError, did_you_mean

# Blocks, width, heads. Hidden width is four times the width.
BERT_SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
GPT2_SIZES = {
    "nano": (3, 48, 3),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}
# Blocks, width, heads, key-value heads, hidden width, vocabulary, base of the rotary wavelengths.
LLAMA_SIZES = {
    "tiny": (6, 288, 6, 6, 768, 32000, 10_000.0),
    "7b": (32, 4096, 32, 32, 11008, 32000, 10_000.0),
    "8b": (32, 4096, 32, 8, 14336, 128256, 500_000.0),
    "13b": (40, 5120, 40, 40, 13824, 32000, 10_000.0),
    "70b": (80, 8192, 64, 8, 28672, 32000, 10_000.0),
}


def bert(size: str) -> dict[str, Any]:
    """An encoder of Devlin et al. (2019), or a small one of Turc et al. (2019).

    Left out, because the model has no field for it: token-type embeddings, the pooler, and what BERT puts between its
    last block and its table (a dense layer, a norm, a bias). GELU is the tanh form.

    Args:
      size: tiny, mini, small, medium, base or large.

    Returns:
      fields of `ModelConfig`, `architecture` as a dict of its own; train them with `objective.name="mlm"`.

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
        "ffn": "gelu",
        "positions": "learned",
        "max_positions": 512,
        "embedding_norm": True,
        "use_bias": True,
        "ties_embedding": True,
        "dropout": 0.1,
        "attention": "bidirectional",
        "architecture": _one_block_stacks(n_blocks),
    }


def gpt2(size: str) -> dict[str, Any]:
    """A decoder of Radford et al. (2019); "nano" is the smallest shape of minGPT.

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
    """A decoder of LLaMA 2 (Touvron et al., 2023), of LLaMA 3 ("8b"; Grattafiori et al., 2024), or a tiny one.

    "70b" is the shape of LLaMA 2: 68.98B parameters with the vocabulary of 32000.

    Args:
      size: tiny, 7b, 8b, 13b or 70b.

    Returns:
      fields of `ModelConfig`, `architecture` as a dict of its own.

    Raises:
      UserError: an unknown size.
    """
    n_blocks, d_model, n_heads, n_kv_heads, d_ff, vocab_size, rope_theta = _sizes_of("llama", LLAMA_SIZES, size)
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_ff": d_ff,
        "rope_theta": rope_theta,
        "architecture": _one_block_stacks(n_blocks),
    }


def _one_block_stacks(n_blocks: int) -> dict[str, int]:
    return {"n_stacks": n_blocks, "blocks_per_stack": 1}


def _sizes_of(family: str, sizes: dict[str, Any], size: str) -> Any:
    if size not in sizes:
        names = ", ".join(sizes)
        raise UserError(f"{family} size {size!r} must be one of: {names}.{did_you_mean(str(size), sizes)}")
    return sizes[size]

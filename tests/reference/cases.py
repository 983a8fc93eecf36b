"""The models and rows on which this package and `transformers` are compared; imports neither torch nor transformers.

Weights are drawn by name with numpy, so that both sides have them without a file.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
V, T = 96, 24
ENTRIES_PER_GRADIENT = 48  # of each gradient, that a golden file holds

_BERT = {
    "model_type": "bert",
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": T,
}
_MODERNBERT = {
    "model_type": "modernbert",
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 5,  # global, local, local, global, local
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "local_attention": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_GPT2 = {"model_type": "gpt2", "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": T}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Dense feed-forwards throughout: what is compared is its attention.
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "first_k_dense_replace": 2,
    "num_mtp_layers": 0,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its rows.

    Attributes:
      config: entries of a `config.json`.
      packed: two documents and padding share a row, positions begin anew; else padding alone.
      token_types: given, at random.
    """

    config: dict[str, Any]
    packed: bool = False
    token_types: bool = False


CASES = {
    "bert": Case(_BERT, token_types=True),
    "bert_untied_tanh": Case({**_BERT, "tie_word_embeddings": False, "hidden_act": "gelu_new"}, packed=True),
    "modernbert": Case(_MODERNBERT),
    "modernbert_packed": Case(_MODERNBERT, packed=True),
    "gpt2": Case(_GPT2),
    "gpt2_packed_untied": Case({**_GPT2, "tie_word_embeddings": False}, packed=True),
    "llama2": Case(_LLAMA, packed=True),
    "llama3_grouped": Case({**_LLAMA, "num_key_value_heads": 2, "rope_theta": 500_000.0, "head_dim": 16}),
    "llama31_scaled": Case(
        {
            **_LLAMA,
            "num_key_value_heads": 2,
            "rope_theta": 500.0,
            "rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 32},
        },
        packed=True,
    ),
    "llama_linear_tied_biases": Case(
        {
            **_LLAMA,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        }
    ),
}
# No family of `interop`, so compared by a test of their own (`test_latent.py`).
LATENT_CASES = {
    "deepseek_v3": Case(_DEEPSEEK, packed=True),
    "deepseek_lite": Case({**_DEEPSEEK, "q_lora_rank": None}),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of theirs by its name, float32: scales of norms around 1, the rest around 0."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    is_scale = len(shape) == 1 and name.endswith(".weight")
    return (1.0 + 0.2 * values if is_scale else 0.2 * values).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Two rows of `T` places, as int32 arrays [2 T]; segments count documents from 1 and are 0 on padding."""

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    token_types: np.ndarray


def rows_of(case: Case) -> Rows:
    """The rows of a case."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(3, V, (2, 2, T)).astype(np.int32)
    types = rng.integers(0, 2, (2, T)).astype(np.int32)
    if case.packed:
        lengths = [(9, 11, 4), (15, 9, 0)]
        segments = np.array([[1] * a + [2] * b + [0] * c for a, b, c in lengths], np.int32)
        positions = np.array([[*range(a), *range(b), *range(c)] for a, b, c in lengths], np.int32)
    else:
        segments = np.array([[1] * (T - 7) + [0] * 7, [1] * T], np.int32)
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T)).copy()
    return Rows(tokens, targets, segments, positions, types if case.token_types else np.zeros_like(types))


def chosen_entries(name: str, size: int) -> np.ndarray:
    """Which entries of a flattened gradient a golden file holds."""
    rng = np.random.default_rng(zlib.crc32(f"gradient of {name}".encode()))
    return rng.choice(size, min(size, ENTRIES_PER_GRADIENT), replace=False)

"""What a run costs, from shapes alone: parameters, floating-point operations, bytes.

Model FLOPs: a matmul of a weight with n entries costs 2 n a token forward and 4 n backward (2 n where the weight is
frozen and gradient only passes through); attention scores and mixing count besides, half of the square when causal.
Recomputation by remat is not counted.
"""

import dataclasses
import math
import typing
from typing import Any

import jax

from stackwise_jax.memory.precision import item_bytes, token_bytes, weight_bytes
from stackwise_jax.models import weights
from stackwise_jax.ops.rounding import BLOCK
from stackwise_jax.schema import ModelConfig, RunConfig

_OF_QUERIES = ("query", "query_latent", "query_norm", "output")  # maps of attention that serve a place's own reading


def parameters_per_device(table: weights.Table, fsdp: int) -> int:
    """Parameters of a table that lie on one device: its share of every matrix, and all vectors."""
    leaves = jax.tree.leaves(table, is_leaf=weights.is_weight)
    return sum(weight.size // (fsdp if weight.is_matrix else 1) for weight in leaves)


def block_parameters(model: ModelConfig) -> int:
    """Parameters of one block."""
    return weights.count(weights.block_table(model))


def stored_block_bytes(config: RunConfig, fsdp: int = 1) -> int:
    """Bytes of one frozen block in trunk precision: of its share on one of `fsdp` devices that divide the matrices."""
    leaves = jax.tree.leaves(weights.block_table(config.model), is_leaf=weights.is_weight)
    return sum(weight_bytes(weight, config.precision.trunk) // (fsdp if weight.is_matrix else 1) for weight in leaves)


def block_forward_flops(model: ModelConfig, seq_len: int, attention: str | None = None) -> float:
    """FLOPs of one block a token, forward; of the mean of all blocks where they are unlike.

    Args:
      attention: kind of mask, where it is not the model's; block diffusion runs every row twice, side by side.
    """
    table = weights.block_table(model)
    leaves = jax.tree.leaves([table["mlp"], table["attention"]], is_leaf=weights.is_weight)
    matrices = sum(weight.size for weight in leaves if len(weight.shape) > 1) - idle_parameters(model)
    kind = attention or model.attention
    mixing = _mixing_flops(model, _places_seen(model, seq_len, kind))
    return (2.0 if kind == "block_diffusion" else 1.0) * (2.0 * matrices + mixing)


def fixed_parameters(model: ModelConfig, fsdp: int = 1) -> int:
    """Parameters of a block, or a device's share of them, that stay as they were drawn and have no moments."""
    leaves = jax.tree.leaves(weights.block_table(model), is_leaf=weights.is_weight)
    return sum(weight.size // fsdp for weight in leaves if weight.is_fixed)


def _fixed_flops(model: ModelConfig) -> float:
    """FLOPs of one block a token that its backward pass is spared: of gradients of fixed matrices."""
    idle = 1.0 - model.experts.active / model.experts.count if model.has_experts else 0.0
    leaves = jax.tree.leaves(weights.block_table(model), is_leaf=weights.is_weight)
    return sum((2.0 * w.size * (1.0 - idle if w.axes[0] == "E" else 1.0) for w in leaves if w.is_fixed), 0.0)


def idle_parameters(model: ModelConfig) -> int:
    """Parameters of a block that a token does not meet: those of the experts that it is not sent to."""
    if not model.has_experts:
        return 0
    of_experts = weights.count(weights.block_table(model)["mlp"]["experts"])
    return of_experts * (model.experts.count - model.experts.active) // model.experts.count


def _mixing_flops(model: ModelConfig, seen: float) -> float:
    """FLOPs of scores and mixing of a block a token, `seen` places each; of kernels also those of random features.

    In linear time every key is added to sums and every query reads them, however many places there are.
    """
    n_heads, kv_heads = model.n_heads, typing.cast(int, model.n_kv_heads)
    width, values = weights.product_width(model), weights.value_width(model)
    features = 0.0
    if model.has_kernel and model.kernel.family != "linear":
        features = 2.0 * (n_heads + kv_heads) * weights.key_width(model) * (model.kernel.n_features // 2)
    if not model.is_linear_time:
        return features + 2.0 * seen * n_heads * (width + values)
    positive = model.kernel.positive_features
    return features + 2.0 * (n_heads + kv_heads) * positive * (width + values + 1)


def _places_seen(model: ModelConfig, seq_len: int, kind: str) -> float:
    """Places that a place attends to, in the mean over places and blocks, whatever is masked away besides."""
    if model.causal_from is not None and kind != "causal":
        both = dataclasses.replace(model, causal_from=None)
        share = model.causal_from / model.n_blocks
        return share * _places_seen(both, seq_len, kind) + (1.0 - share) * _places_seen(both, seq_len, "causal")
    sides = 1 if kind == "causal" else 2
    whole = sides * seq_len / 2
    if model.window is None:
        return whole
    local = min(whole, sides * model.window + 1.0)
    if model.global_every is None:
        return local
    n_global = -(-model.n_blocks // model.global_every)
    return (n_global * whole + (model.n_blocks - n_global) * local) / model.n_blocks


def stored_forward_flops(model: ModelConfig) -> float:
    """FLOPs a token of what a reader keeps of a place in one block: its keys and values, or the latents of them."""
    maps = {name: own for name, own in weights.block_table(model)["attention"].items() if name not in _OF_QUERIES}
    return 2.0 * sum(w.size for linear in maps.values() for w in linear.values() if w.is_matrix)


def head_forward_flops(model: ModelConfig) -> float:
    """FLOPs of the output table, and of BERT's map before it, a token, forward."""
    return 2.0 * model.d_model * (model.vocab_size + (model.d_model if model.head_transform else 0))


def step_flops_per_token(
    model: ModelConfig,
    seq_len: int,
    *,
    live_blocks: int,
    passed_blocks: int,
    trunk_blocks: int,
    table_is_live: bool,
    adapter_parameters: int = 0,
    attention: str | None = None,
    loss_fraction: float = 1.0,
) -> float:
    """FLOPs a token of one update.

    Args:
      live_blocks: trained (3 forward costs; 2 of matrices that are fixed).
      passed_blocks: frozen, with gradient through them (2 forward costs).
      trunk_blocks: frozen and recomputed (1 forward cost); 0 when cached.
      table_is_live: the output table takes a gradient.
      adapter_parameters: of low-rank parts, trained.
      attention: as in `block_forward_flops`.
      loss_fraction: of the places, whose loss is computed.
    """
    block = block_forward_flops(model, seq_len, attention)
    blocks = (3 * live_blocks + 2 * passed_blocks + trunk_blocks) * block + 6.0 * adapter_parameters
    blocks -= live_blocks * _fixed_flops(model) * (2 if attention == "block_diffusion" else 1)
    head = loss_fraction * head_forward_flops(model) * (2 if attention == "block_diffusion" else 1)
    return blocks + (3 if table_is_live else 2) * head


def cache_bytes(config: RunConfig, n_rows: int, variants: int) -> int:
    """Bytes of cached activations of `n_rows` rows."""
    return n_rows * variants * config.data.seq_len * token_bytes(config.precision.cache, config.model.d_model)


def hidden_bytes(config: RunConfig) -> int:
    """Bytes of what blocks pass on, of a device's part of a batch."""
    rows = config.training.batch_size // config.mesh.n_devices
    return rows * config.data.seq_len * config.model.d_model * item_bytes(config.precision.compute)


def gathered_bytes(config: RunConfig) -> int:
    """Of divided weights, what is whole at once: a block, the next one, and the output table."""
    whole = 2 * block_parameters(config.model) + config.model.vocab_size * config.model.d_model
    return whole * item_bytes(config.precision.compute)


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Device memory at one moment, by what fills it."""

    weights: int = 0  # live
    optimizer: int = 0
    gradients: int = 0
    frozen: int = 0  # stacks that are run through
    head: int = 0  # a frozen head and embedding, and logits with their gradient
    gathered: int = 0  # weights once more as they are multiplied: cast, decoded, or brought together
    activations: int = 0
    workspace: int = 0  # of kernels, gaps in the buffer of temporary values, and what the count may miss
    cache: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def besides_cache(self) -> int:
        return self.total - self.cache

    def __add__(self, other: "DeviceBytes") -> "DeviceBytes":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return DeviceBytes(*(one + two for one, two in pairs))


def optimizer_bytes(config: RunConfig, *, live: int, live_in_stacks: int) -> int:
    """Moments: two a parameter, one for what Muon trains (counted as everything live in stacks).

    Those of vectors are float32 whatever `precision.optimizer` says, and too few to be counted apart.
    """
    of_muon = live_in_stacks if config.optimizer.name == "muon" else 0
    moments = 2 * live - of_muon
    if config.precision.optimizer == "int8":
        return moments + 4 * math.ceil(moments / BLOCK)
    return moments * item_bytes(config.precision.optimizer)


def weight_and_gradient_bytes(config: RunConfig, *, live: int, live_in_stacks: int) -> tuple[int, int]:
    """Bytes of live weights, and of their gradients, which have the dtype of the weight unless they are accumulated."""
    weights_bytes = 4 * live + (item_bytes(config.precision.weights) - 4) * live_in_stacks
    return weights_bytes, weights_bytes if config.training.accumulation_steps == 1 else 4 * live


def tree_bytes(tree: Any) -> int:
    """Bytes of every array of a tree, or of what has their shapes; a random key, which hides its dtype, counts as 8."""
    return sum(leaf.size * getattr(leaf.dtype, "itemsize", 8) for leaf in jax.tree.leaves(tree))


def readable_bytes(count: int | float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def readable_count(count: int | float) -> str:
    """68_980_000_000 -> "68.98B"."""
    for scale, unit in ((1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= scale:
            return f"{count / scale:.2f}{unit}"
    return f"{count:.0f}"

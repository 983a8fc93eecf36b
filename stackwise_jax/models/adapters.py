"""Adapters: the low-rank part that is trained beside the settled matrices of a stack (LoRA; Hu et al., 2021).

An adapter is a plain tree with the structure of its stack, cut down to the matrices that it adapts: {"attention":
{"query": {"kernel": {"a": [L D R], "b": [L R F]}}}}. It is trained, saved and counted alone; `attach` puts it on a
stack, whatever the stack is stored as, and `merge` adds it in for good. Two on one stack (dual LoRA) attach in turn.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from stackwise_jax.models import weights
from stackwise_jax.ops.lowrank import LowRank, merged
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params


def adapter_table(model: ModelConfig, rank: int, targets: str) -> weights.Table:
    """The weights of the adapter of one block: `a` normal with a variance of one over its inputs, `b` zero.

    Args:
      targets: names of linear maps, separated by commas ("query,value"), or "all".

    Raises:
      ValueError: a name that no linear map of the block has.
    """
    names = {name.strip() for name in targets.split(",")}
    found, block = {"all"}, weights.block_table(model)
    # The rest of a block are norms, vectors, and the adaptive norms' map, which reads a row's time and no activations.
    # Experts have none: a map of theirs is many matrices.
    maps = {part: block[part] for part in ("attention", "mlp")}
    maps["mlp"] = {name: node for name, node in maps["mlp"].items() if name not in ("router", "experts")}
    table = _of_targets(maps, "", names, rank, found)
    if not names <= found:
        raise ValueError(f"targets={targets!r}: no linear map of the block is called {sorted(names - found)}")
    return table


def _of_targets(node: Any, name: str, names: set[str], rank: int, found: set[str]) -> weights.Table:
    """The part of a block's table at and below `node` that is adapted; adds the names of what it finds to `found`."""
    if "kernel" in node:
        if not names & {"all", name}:
            return {}
        found.add(name)
        kernel: weights.Weight = node["kernel"]
        inputs, outputs = kernel.shape
        a = weights.Weight((inputs, rank), (kernel.axes[0], "R"), std=1.0 / math.sqrt(inputs))
        return {"kernel": {"a": a, "b": weights.Weight((rank, outputs), ("R", kernel.axes[1]), "zeros")}}
    inside = {
        child: _of_targets(value, child, names, rank, found)
        for child, value in node.items()
        if not weights.is_weight(value)
    }
    return {child: table for child, table in inside.items() if table}


def adapter_parameters(model: ModelConfig, rank: int, targets: str) -> int:
    """Parameters of the adapter of one block."""
    return weights.count(adapter_table(model, rank, targets))


def init_adapter(
    key: Key, model: ModelConfig, first_block: int | Array, n_blocks: int, *, rank: int, targets: str
) -> Params:
    """Draws the adapter of blocks `first_block ..`, float32; as in `init_stack` grouping changes no value.

    With `b` zero it changes nothing yet: the stack that it is attached to puts out what it did.
    """
    table = adapter_table(model, rank, targets)
    keys = jax.vmap(lambda block: jax.random.fold_in(key, block))(first_block + jnp.arange(n_blocks))
    return jax.vmap(lambda own_key: weights.init_weights(own_key, table))(keys)


def attach(stack: Params, adapter: Params, alpha: float) -> Params:
    """A stack whose adapted kernels are `LowRank`, scaled by alpha / rank; it shares the arrays of both trees.

    Args:
      stack: block parameters with a leading axis `L`, stored as they are; adapters may be attached already.

    Raises:
      ValueError: the adapter is not one of this stack.
    """
    return _with_kernels(
        stack, adapter, lambda kernel, part: LowRank(kernel, part["a"], part["b"], _scale(part, alpha))
    )


def merge(stack: Params, adapter: Params, alpha: float) -> Params:
    """A plain stack that equals `attach(stack, adapter, alpha)` to rounding in the dtype of its kernels.

    Raises:
      ValueError: the adapter is not one of this stack.
      TypeError: a kernel is stored quantised.
    """
    return _with_kernels(
        stack, adapter, lambda kernel, part: merged(LowRank(kernel, part["a"], part["b"], _scale(part, alpha)))
    )


def _scale(part: Params, alpha: float) -> float:
    return alpha / part["a"].shape[-1]


def _with_kernels(stack: Params, adapter: Params, change: Any) -> Params:
    """The stack with `change(kernel, part)` in the place of each kernel that the adapter has a part for."""
    unknown = sorted(set(adapter) - set(stack))
    if unknown:
        raise ValueError(f"the adapter has parts for {unknown}, which this stack of {sorted(stack)} lacks")
    changed = {
        name: change(stack[name], part) if name == "kernel" else _with_kernels(stack[name], part, change)
        for name, part in adapter.items()
    }
    return {**stack, **changed}

"""Device memory of the programs of a phase: traced at their real shapes, counted by `memory/liveness.py`, never run.

What is counted is the functions that the loop runs, so a change of the model, the step or the optimiser changes the
count. A trace takes a fraction of a second, and equal programs are counted once in a process.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stackwise_jax.memory import budget
from stackwise_jax.memory.fusion import MATMUL_WORKSPACE
from stackwise_jax.memory.liveness import Peak, Stored, peak_memory
from stackwise_jax.memory.precision import DTYPES, decoded
from stackwise_jax.models import weights
from stackwise_jax.objectives.objective import Task
from stackwise_jax.ops.target import NO_GPU, Target, planned_for
from stackwise_jax.schema import (
    ArchitectureConfig,
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoggingConfig,
    MeshConfig,
    RunConfig,
)
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import make_chained_evaluation, make_chained_step
from stackwise_jax.train.phases import Name, Role, Signature, stack_sizes
from stackwise_jax.train.program import Program
from stackwise_jax.train.scaling import init_scaling
from stackwise_jax.train.state import PartSource, TrainState, adapter_name, part_shape
from stackwise_jax.train.step import make_evaluation, make_train_step
from stackwise_jax.types import Batch, Params, Vocabulary

_LABELS = {"params": "weights", "optimizer": "optimizer", "frozen_stacks": "frozen", "head": "head"}
_LABELS |= {"embedding": "head", "rows": "activations"}
_KEPT_SECTIONS = ("model", "objective", "training", "optimizer", "precision")


def comparable(config: RunConfig) -> RunConfig:
    """The config of one device's share of the rows, without what changes no shape; equal ones are counted once.

    How a rack is cut is kept where blocks differ by their place: it decides what their program knows of them.
    """
    training, sizes = config.training, stack_sizes(config)
    differ = any(weights.known_facts(config.model, (0,), 1))
    architecture = ArchitectureConfig(len(sizes), sizes[0]) if differ else ArchitectureConfig(1, 1)
    rows = max(training.accumulation_steps, training.batch_size // config.mesh.n_devices)
    same: dict[str, Any] = {"mode": "stackwise", "phase_budget": "", "embedding_budget": "", "embedding_phase": ""}
    kept = {name: getattr(config, name) for name in _KEPT_SECTIONS}
    kept["model"] = dataclasses.replace(config.model, architecture=architecture)
    kept["training"] = dataclasses.replace(training, **same, head="", batch_size=rows)
    kept["optimizer"] = dataclasses.replace(config.optimizer, learning_rate=1.0)
    data = DataConfig(seq_len=config.data.seq_len, isolate_documents=config.data.isolate_documents)
    sections = {"cache": CacheConfig(), "checkpoint": CheckpointConfig(), "evaluation": EvaluationConfig()}
    sections |= {"generation": GenerationConfig(), "logging": LoggingConfig(), "mesh": MeshConfig()}
    return RunConfig(name="", data=data, **kept, **sections)


@functools.lru_cache(maxsize=512)
def training_bytes(config: RunConfig, sig: Signature, target: Target) -> budget.DeviceBytes:
    """Of a train step and everything that it is called with.

    Args:
      config: a `comparable` one.
    """
    step, operands = _step(config, sig)
    state, frozen, *rest = operands
    labels = [*_labels({"params": state.params}), *_labels({"optimizer": state.optimizer})]
    labels += _labels({"rows": state.scaling}) + _frozen_labels(frozen) + _labels({"rows": rest})
    is_chain = sig.execution == "chained"
    donated = 0 if is_chain else len(jax.tree.leaves(state))
    peak = _counted(step, operands, labels, target, is_chain=is_chain, donated=donated)
    return _by_tier(peak, config, jax.tree.leaves(state.params))


def compiled_step(config: RunConfig, sig: Signature) -> Any:
    """The fused train step compiled for the device at hand, from shapes; `config` as in `training_bytes`."""
    step, operands = _step(config, sig)
    return step.lower(*operands).compile()


def _step(config: RunConfig, sig: Signature) -> tuple[Any, tuple[Any, ...]]:
    """A train step and, as shapes, what it is called with."""
    program, state, frozen, batch, activations = _operands(config, sig)
    kinds = [own if isinstance(own, list) else [own] for own in state.params.values()]
    fractions = jax.ShapeDtypeStruct((sum(map(len, kinds)),), jnp.float32)
    operands = (state, frozen, batch, activations, fractions, jax.ShapeDtypeStruct((), jnp.int32))
    is_chain = sig.execution == "chained"
    return make_chained_step(ChainPrograms(program), sig) if is_chain else make_train_step(program, sig), operands


@functools.lru_cache(maxsize=512)
def evaluation_bytes(config: RunConfig, sig: Signature, target: Target) -> budget.DeviceBytes:
    """Of a held-out batch, optimiser state not among it; `config` as in `training_bytes`."""
    program, state, frozen, batch, activations = _operands(config, sig)
    labels = _labels({"params": state.params}) + _frozen_labels(frozen) + _labels({"rows": (batch, activations)})
    is_chain = sig.execution == "chained"
    evaluate = make_chained_evaluation(ChainPrograms(program), sig) if is_chain else make_evaluation(program, sig)
    peak = _counted(evaluate, (state.params, frozen, batch, activations), labels, target, is_chain=is_chain)
    return _by_tier(peak, config, jax.tree.leaves(state.params))


def _counted(
    function: Callable[..., Any],
    operands: tuple[Any, ...],
    labels: list[str],
    target: Target,
    *,
    is_chain: bool = False,
    donated: int = 0,
) -> Peak:
    """The memory of a function of arrays, compiled as one program unless it is a chain of them."""
    with planned_for(target):
        closed = jax.make_jaxpr(function)(*operands)
    workspace = 0 if target == NO_GPU else MATMUL_WORKSPACE
    return peak_memory(
        closed,
        labels,
        flops_per_byte=target.flops_per_byte,
        donated=donated,
        is_chain=is_chain,
        workspace=workspace,
    )


@functools.lru_cache(maxsize=512)
def passing_bytes(config: RunConfig, task: Task, blocks: int, target: Target) -> budget.DeviceBytes:
    """Of a batch that passes through a frozen stack of `blocks` blocks, which is there as stored and decoded.

    Args:
      config: as in `training_bytes`.
    """
    program = Program(config, _vocabulary(config), config.training.batch_size)
    stored, timing, x, batch = (
        _stored_shape(config, blocks),
        _timing_shape(config),
        _hidden_shape(config),
        _batch(config, task),
    )
    structure: Any = None

    def decode(stored: Params) -> list[Any]:
        nonlocal structure
        leaves, structure = jax.tree.flatten(decoded(stored, program.dtype, in_fp8=program.trunk_in_fp8))
        return leaves

    def forward(leaves: list[Any], timing: Params, x: Any, batch: Batch) -> Any:
        stack = jax.tree.unflatten(structure, leaves)
        return program.apply_trunk_stack(stack, x, program.context(task, program.corrupt(task, batch), timing))

    leaves = jax.eval_shape(decode, stored)
    labels = _labels({"frozen_stacks": leaves}) + _labels({"rows": (timing, x, batch)})
    own = _by_tier(_counted(forward, (leaves, timing, x, batch), labels, target), config, [])
    is_stored_so = structure == jax.tree.structure(stored)
    return own if is_stored_so else dataclasses.replace(own, gathered=own.gathered + budget.tree_bytes(stored))


def part_bytes(config: RunConfig, kind: str, blocks: int, has_table: bool, rank: int) -> tuple[int, int]:
    """(bytes of weights, of optimiser state) of a live part; arguments as in `_fresh_shape`."""
    params, moments = _fresh_shape(config, kind, blocks, has_table=has_table, rank=rank)
    return budget.tree_bytes(params), budget.tree_bytes(moments)


def part_size(config: RunConfig, kind: str, blocks: int, has_table: bool, rank: int) -> int:
    """Parameters of a live part, facts about blocks among them."""
    return sum(
        leaf.size for leaf in jax.tree.leaves(_fresh_shape(config, kind, blocks, has_table=has_table, rank=rank)[0])
    )


def _operands(config: RunConfig, sig: Signature) -> tuple[Program, TrainState, Params, Batch, Any]:
    """(program, state, frozen parts, batch, activations) of a step, as shapes."""
    fresh = functools.partial(_fresh_shape, config, has_table=sig.head_has_table)
    ranks = iter(sig.ranks)
    parts: dict[str, Any] = {}
    frozen: Params = {"frozen_stacks": []}
    for blocks, role in sig.body:
        if role is Role.LIVE:
            parts.setdefault("stacks", []).append(fresh("stack", blocks))
        else:
            frozen["frozen_stacks"].append(_stored_shape(config, blocks))
        if role is Role.ADAPTER:
            parts.setdefault("adapters", []).append(fresh("adapter", blocks, rank=next(ranks)))
    for name in ("embedding", "head"):
        if getattr(sig, name) is Role.LIVE:
            parts[name] = fresh(name, 0)
    if sig.head is Role.FROZEN:
        frozen["head"] = fresh("head", 0)[0]
    if sig.embedding is Role.FROZEN:
        is_read = not sig.head_has_table or config.objective.consistency > 0.0
        embedding = fresh("embedding", 0)[0] if is_read else _timing_shape(config)
        frozen |= {"embedding": embedding} if embedding else {}
    halves = [
        {name: [own[half] for own in part] if isinstance(part, list) else part[half] for name, part in parts.items()}
        for half in (0, 1)
    ]
    program = Program(config, _vocabulary(config), config.training.batch_size)
    state = TrainState(halves[0], halves[1], jax.eval_shape(lambda: init_scaling(config)))
    return program, state, frozen, _batch(config, sig.task), _hidden_shape(config) if sig.reads_activations else None


def _vocabulary(config: RunConfig) -> Vocabulary:
    """Of any tokenizer: which ids are special changes no shape."""
    return Vocabulary(config.model.vocab_size, mask_id=0, special_ids=(0,))


def _batch(config: RunConfig, task: Task) -> Batch:
    B, T = config.training.batch_size, config.data.seq_len
    rows, ids = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
    opens = task.attention == "prefix" and task.objective != "prefix"  # then the phase says how far (`Branch.opened`)
    return Batch(rows, rows, rows, ids, ids, prefix_lengths=ids if opens else None)


def _hidden_shape(config: RunConfig) -> Any:
    shape = (config.training.batch_size, config.data.seq_len, config.model.d_model)
    return jax.ShapeDtypeStruct(shape, DTYPES[config.precision.compute])


@functools.lru_cache(maxsize=512)
def _fresh_shape(config: RunConfig, kind: str, blocks: int, *, has_table: bool, rank: int = 0) -> tuple[Any, Any]:
    """(weights, optimiser state) of a fresh part: "stack" or "adapter" (of `blocks` blocks), "embedding" or "head"."""
    if rank:
        adapters = dataclasses.replace(config.training.adapters, rank=rank, ranks="constant")
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, adapters=adapters))
    source = PartSource(_with_blocks(config, blocks), jax.random.key(0))
    name: Name = {"stack": 0, "adapter": adapter_name(0)}.get(kind, kind)
    return jax.eval_shape(lambda: source.fresh(name, has_table))


@functools.lru_cache(maxsize=512)
def _stored_shape(config: RunConfig, blocks: int) -> Any:
    return part_shape(_with_blocks(config, blocks), jax.random.key(0), "stacks", "0")


def _timing_shape(config: RunConfig) -> Params:
    """Of a settled embedding, what blocks are told the time by."""
    embedding = _fresh_shape(config, "embedding", 0, has_table=True)[0]
    return {"time": embedding["time"]} if "time" in embedding else {}


def _with_blocks(config: RunConfig, blocks: int) -> RunConfig:
    """A rack of one stack of so many blocks, which is as any other of that size."""
    architecture = ArchitectureConfig(n_stacks=1, blocks_per_stack=max(1, blocks))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, architecture=architecture))


def _labels(tree: Any) -> list[str]:
    """One label for every array of {name: tree}."""
    return [_LABELS[name] for name, own in tree.items() for _ in jax.tree.leaves(own)]


def _frozen_labels(frozen: Params) -> list[str]:
    return _labels(dict(sorted(frozen.items())))


def _by_tier(peak: Peak, config: RunConfig, live: list[Any]) -> budget.DeviceBytes:
    """What is alive at the peak, by what it is; workspaces and gaps are what is left."""
    gradients = {_squeezed(leaf.shape) for leaf in live} | {_squeezed(leaf.shape[1:]) for leaf in live}
    vocabulary, rows = config.model.vocab_size, config.training.batch_size // config.training.accumulation_steps
    is_told_apart = vocabulary not in (rows * config.data.seq_len, config.model.d_ff, config.model.d_model)
    tiers = dict.fromkeys((field.name for field in dataclasses.fields(budget.DeviceBytes)), 0)
    for stored in peak.stored:
        tiers[_tier(stored, vocabulary if is_told_apart else -1, gradients)] += stored.bytes
    tiers["workspace"] = max(0, peak.total - sum(tiers.values()))
    return budget.DeviceBytes(**tiers)


def _tier(stored: Stored, vocabulary: int, gradients: set[tuple[int, ...]]) -> str:
    if stored.is_argument:
        return next(iter(stored.labels))
    if "optimizer" in stored.labels:
        return "optimizer"
    if stored.labels & {"weights", "frozen", "head"} and stored.labels <= {"", "weights", "frozen", "head"}:
        return "gathered"
    if not stored.labels and _squeezed(stored.shape) in gradients and len(_squeezed(stored.shape)) > 1:
        return "gradients"
    return "head" if vocabulary in stored.shape else "activations"


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)

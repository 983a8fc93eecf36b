"""A stack: consecutive equal blocks whose parameters share a leading axis, applied by one scan."""

import functools
import itertools
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from stackwise_jax.models import weights
from stackwise_jax.models.block import Block
from stackwise_jax.models.mixing import Context
from stackwise_jax.models.stores import Store
from stackwise_jax.schema import ModelConfig
from stackwise_jax.types import Key, Params, Quantised

Body = Callable[[Array, Any], Any]
"""One turn of the loop over blocks: (activations, (the block's weights, its key)) -> (activations, penalty | None)."""

# What the backward pass of a block keeps: everything, the matmul outputs, or only the block's input. Where both passes
# lie in one program and not in two loops, the compiler would find the second computation equal to the first and keep
# the first: `without_loop` forbids it that.
REMAT: dict[str, Callable[[Body, bool], Body]] = {
    "none": lambda body, without_loop: body,
    "dots": lambda body, without_loop: jax.checkpoint(
        body, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=without_loop
    ),
    "full": lambda body, without_loop: jax.checkpoint(body, prevent_cse=without_loop),
}


def init_stack(key: Key, model: ModelConfig, first_block: int | Array, n_blocks: int) -> Params:
    """Draws blocks `first_block ..` of the rack; a block's values depend on its place in the rack, not on grouping."""
    table = weights.block_table(model)

    def draw(block: Array) -> Params:
        return weights.init_weights(jax.random.fold_in(key, block), table) | weights.block_facts(model, block)

    return jax.vmap(draw)(first_block + jnp.arange(n_blocks))


def placed(params: Params, model: ModelConfig, first_block: int | Array) -> Params:
    """A stack from somewhere else as blocks `first_block ..` of the rack: what its place says of each block is new.

    Args:
      params: of any storage; its dtypes are kept.
    """
    facts = jax.vmap(lambda block: weights.block_facts(model, block))(first_block + jnp.arange(stack_size(params)))
    return params | {name: fact.astype(params[name].dtype) for name, fact in facts.items()}


def stack_size(params: Params) -> int:
    """Number of blocks in a stack."""
    return jax.tree.leaves(params)[0].shape[0]


def apply_stack(
    params: Params,
    x: Float[Array, "B T D"],
    context: Context,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    in_fp8: bool = False,
    remat: str = "none",
    unroll: int = 1,
    key: Key | None = None,
    around: Callable[[Body], Body] = lambda body: body,
) -> Float[Array, "B T D"]:
    """Runs the blocks of a stack in turn; arguments as of `apply_penalised_stack`."""
    own: dict[str, Any] = {"dtype": dtype, "in_fp8": in_fp8, "remat": remat, "unroll": unroll, "key": key}
    return apply_penalised_stack(params, x, context, model, around=around, **own)[0]


def apply_penalised_stack(
    params: Params,
    x: Float[Array, "B T D"],
    context: Context,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
    in_fp8: bool = False,
    remat: str = "none",
    unroll: int = 1,
    key: Key | None = None,
    around: Callable[[Body], Body] = lambda body: body,
    known: Sequence[Mapping[str, bool]] = (),
) -> tuple[Float[Array, "B T D"], Float32[Array, ""] | None]:
    """Runs the blocks of a stack in turn.

    Args:
      params: block parameters with a leading axis `L`; kernels are arrays or `Quantised`.
      dtype: of matmul inputs and of the residual stream.
      in_fp8: matmuls with arrays take their inputs on to fp8.
      remat: a key of `REMAT`.
      unroll: blocks in one turn of the loop; the whole stack or more: no loop, which spares the copies of what the
        backward pass keeps into and out of arrays with a block axis.
      key: for dropout; None leaves it out.
      around: is put around each block; on several devices it brings the block's weights together.
      known: facts about each block (`weights.known_facts`), which then is another program for another fact. They have
        no part in a loop, whose turns are one program.

    Returns:
      Activations, and what the routers of all blocks add to the training loss, a token (None without experts).
    """
    block = Block(model, dtype, in_fp8)
    n_blocks = stack_size(params)
    keys = None if key is None or model.dropout == 0.0 else jax.random.split(key, n_blocks)

    def body(
        facts: Mapping[str, bool], hidden: Array, of_block: tuple[Params, Key | None]
    ) -> tuple[Array, Array | None]:
        block_params, block_key = of_block
        own = {"params": {**block_params, **facts}}
        hidden, _, penalty = typing.cast(Any, block.apply(own, hidden, context, block_key))
        return hidden, penalty

    unroll = min(unroll, n_blocks)
    without_loop = n_blocks < 2 * unroll  # a loop of one turn is none to the compiler

    def turn_of(facts: Mapping[str, bool]) -> Body:
        return REMAT[remat](around(functools.partial(body, facts)), without_loop)

    if without_loop:
        params, x = _decoded_here(params, x)
    x = x.astype(dtype)
    if not (without_loop and any(known)):
        x, penalties = jax.lax.scan(turn_of({}), x, (params, keys), length=n_blocks, unroll=unroll)
        return x, None if penalties is None else jnp.sum(penalties)
    collected = []
    for facts, of_block in zip(known, _apart((params, keys), n_blocks), strict=True):
        x, penalty = turn_of(facts)(x, of_block)
        collected.append(penalty)
    return x, None if collected[0] is None else jnp.sum(jnp.stack(collected))


def _apart(tree: Any, n_blocks: int) -> list[Any]:
    """What each block has of a tree. Its gradients are put together again: slices would each have a whole array's."""
    leaves, structure = jax.tree.flatten(tree)
    columns = [[jnp.squeeze(own, 0) for own in jax.lax.split(leaf, (1,) * n_blocks)] for leaf in leaves]
    return [structure.unflatten(own) for own in zip(*columns, strict=True)]


def decode_stack(
    params: Params,
    x: Float[Array, "B T D"],
    context: Context,
    stored: Store,
    model: ModelConfig,
    *,
    dtype: DTypeLike,
) -> tuple[Float[Array, "B T D"], Store]:
    """As `apply_stack`, reading and extending what is stored of earlier places (leading axis `L`).

    The store is carried through the loop, which writes each block's part in its place and makes no second store.
    """
    block, n_blocks = Block(model, dtype), stack_size(params)
    if n_blocks == 1:
        params, x = _decoded_here(params, x)

    def body(carry: tuple[Array, Store], of_block: tuple[Params, Array]) -> tuple[tuple[Array, Store], None]:
        (hidden, store), (block_params, index) = carry, of_block
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), store)
        hidden, own, _ = typing.cast(Any, block.apply({"params": block_params}, hidden, context, None, own))
        update = jax.lax.dynamic_update_index_in_dim
        return (hidden, jax.tree.map(lambda leaf, new: update(leaf, new, index, 0), store, own)), None

    return jax.lax.scan(body, (x.astype(dtype), stored), (params, jnp.arange(n_blocks)))[0]


def _decoded_here(params: Params, x: Float[Array, "B T D"]) -> tuple[Params, Float[Array, "B T D"]]:
    """Ties quantised matrices to the activations that they meet.

    The compiler takes a loop of one turn apart, and whatever then does not depend on activations out of the loops
    around it, over tokens, passes or micro-batches: all matrices, decoded, at once.
    """
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    if not any(isinstance(leaf, Quantised) for leaf in leaves):
        return params, x
    return jax.lax.optimization_barrier((params, x))


def regroup(stacks: Sequence[Params], sizes: Sequence[int]) -> list[Params]:
    """Cuts the same blocks into stacks of other sizes; a pure reshape.

    Raises:
      ValueError: the sizes do not add up to the blocks there are.
    """
    total = sum(stack_size(stack) for stack in stacks)
    if sum(sizes) != total:
        raise ValueError(f"sizes={list(sizes)} add up to {sum(sizes)}, but there are {total} blocks")
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stacks)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        jax.tree.map(lambda leaf, start=start, size=size: leaf[start : start + size], joined)
        for start, size in zip(starts, sizes, strict=True)
    ]


def equal_runs(stacks: Sequence[Params], *, apart: Collection[int] = ()) -> list[range]:
    """Consecutive stacks that can be one stack: alike in structure, storage and shapes but for their number of blocks.

    Args:
      stacks: trees of arrays or of their shapes, with adapters attached where they have any.
      apart: places of stacks that go with none before them.

    Returns:
      the places of each run.
    """
    kinds = [
        (jax.tree.structure(stack), [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(stack)])
        for stack in stacks
    ]
    starts = [place for place in range(len(stacks)) if not place or place in apart or kinds[place] != kinds[place - 1]]
    return [range(*ends) for ends in itertools.pairwise([*starts, len(stacks)])]


def join_stacks(shapes: Sequence[Params], read: Callable[[int], Params]) -> Params:
    """Equal stacks as one on the default device, its blocks theirs in order.

    Each is read, written into its place of the one that is there from the beginning, and let go: the host holds one
    stack at a time, and the device none twice.

    Args:
      shapes: of each stack, arrays or their shapes, as in a run of `equal_runs`.
      read: returns the stack at a place of `shapes`, on the host or the device; called once for each, in order.
    """
    total = sum(map(stack_size, shapes))
    whole = jax.tree.map(lambda leaf: jnp.zeros((total, *leaf.shape[1:]), leaf.dtype), shapes[0])
    first_block = 0
    for place, shape in enumerate(shapes):
        whole = jax.block_until_ready(_write_blocks(whole, read(place), first_block))
        first_block += stack_size(shape)
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _write_blocks(whole: Params, part: Params, first_block: Array | int) -> Params:
    """`whole` with the blocks of `part` from `first_block` on, in place."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first_block, axis=0), whole, part
    )

"""Where arrays are: on one device or spread over a mesh of them, in pinned host memory, or on the host as NumPy.

A mesh has two axes. Rows of a batch are spread over both; every matrix of weights, with its gradient and its optimiser
state, is cut along `fsdp` and brought together only where it is used, one block at a time (ZeRO stage 3, Rajbhandari et
al., 2020). Without a mesh nothing is constrained, so one device runs the program it always ran.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from stackwise_jax.errors import UserError
from stackwise_jax.memory import processes
from stackwise_jax.models.stack import Body
from stackwise_jax.schema import MeshConfig

PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
TRITON_FLAG = "xla_gpu_enable_triton_gemm"

# The weights that are cut: all that are matrices in models/weights.py, by the last part of their name, and the parts of
# one that has an adapter.
MATRICES = ("kernel", "tokens", "positions", "token_types", "table", "base", "a", "b")
DATA, FSDP = "data", "fsdp"
_ALL = PartitionSpec((DATA, FSDP))
_WHOLE = "whole_weights"  # names what the backward pass brings together anew instead of keeping it


def split_axis(shape: tuple[int, ...], fsdp: int) -> int | None:
    """The axis along which a matrix is cut: the larger of its last two that `fsdp` divides; None: it stays whole.

    Axes before these count blocks, which are scanned and never cut.
    """
    axes = [axis for axis in (len(shape) - 2, len(shape) - 1) if shape[axis] % fsdp == 0]
    return max(axes, key=lambda axis: shape[axis]) if axes and fsdp > 1 else None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run go. `to_*` move arrays, `as_*` hold them in place inside a program.

    Attributes:
      mesh: of axes (`data`, `fsdp`); None: one device.
    """

    mesh: Mesh | None = None

    @property
    def n_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def fsdp(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[FSDP]

    # Weights and their optimiser state.

    def build(self, make: Callable[..., Any], *args: Any) -> Any:
        """make(*args), a tree of weights or their optimiser state, made where it is to lie and nowhere else."""
        if self.mesh is None:
            return make(*args)
        return jax.jit(make, out_shardings=self._weights(jax.eval_shape(make, *args)))(*args)

    def to_weights(self, tree: Any) -> Any:
        """Copies weights or optimiser state, from the host or anywhere, to the devices."""
        if self.mesh is None:
            return to_device(tree)
        return jax.tree.map(_put, tree, self._weights(tree))

    def as_weights(self, tree: Any) -> Any:
        """Keeps weights, their gradients or optimiser state cut."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, self._weights(tree))

    def as_whole(self, tree: Any, dtype: DTypeLike | None = None) -> Any:
        """Brings cut weights together, to be used now, cast to `dtype` on the way; their gradient is cut again."""
        if self.fsdp == 1:
            return tree

        def whole(path: tuple[Any, ...], leaf: Array) -> Array:
            spec = _weight_spec(path, leaf.shape, self.fsdp)
            if spec == PartitionSpec():
                return leaf
            return self._gather(leaf if dtype is None else leaf.astype(dtype), spec)

        return jax.tree_util.tree_map_with_path(whole, tree)

    def around_block(self, dtype: DTypeLike) -> Callable[[Body], Body]:
        """What is put around each block of a stack: its weights come together for it alone, and again going back."""
        if self.fsdp == 1:
            return lambda body: body

        def around(body: Body) -> Body:
            policy = jax.checkpoint_policies.save_anything_except_these_names(_WHOLE)
            return jax.checkpoint(lambda x, of_block: body(x, self.as_whole(of_block, dtype)), policy=policy)

        return around

    def _gather(self, leaf: Array, spec: PartitionSpec) -> Array:
        """A cut array brought together. Its gradient is summed straight into its parts: a reduce-scatter."""
        here, everywhere = self._at(spec), self._at(PartitionSpec())

        @jax.custom_vjp
        def gather(part: Array) -> Array:
            return jax.lax.with_sharding_constraint(part, everywhere)

        gather.defvjp(
            lambda part: (gather(part), None),
            lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, here),),
        )
        return checkpoint_name(gather(leaf), _WHOLE)

    def _weights(self, tree: Any) -> Any:
        """The sharding of each array of a tree of weights; its name says whether it is one that is cut."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: self._at(_weight_spec(path, leaf.shape, self.fsdp)), tree
        )

    # Rows: batches, activations, the chunks of a cache.

    def to_rows(self, tree: Any) -> Any:
        """Spreads arrays over the devices by their leading axis; every process holds the same whole arrays."""
        return to_device(tree) if self.mesh is None else jax.tree.map(lambda leaf: _put(leaf, self._at(_ALL)), tree)

    def to_small(self, *arrays: np.ndarray | np.generic) -> tuple[Any, ...]:
        """A step's own numbers and indices. On one device their copies begin now: before any large one, if it is asked
        for later, since copies to a device run one after another."""
        return to_device(arrays) if self.mesh is None else arrays

    def as_rows(self, tree: Any, *, axis: int = 0) -> Any:
        """Keeps arrays spread by `axis`, which counts rows."""
        return tree if self.mesh is None else self._constrain(tree, PartitionSpec(*[None] * axis, *_ALL))

    def to_chunk(self, tree: Any) -> Any:
        """Spreads a chunk of a cache, [C T ...], over the devices by T, so that each finds any rows in its own part."""
        if self.mesh is None:
            return to_device(tree)
        return jax.tree.map(lambda leaf: _put(leaf, self._at(PartitionSpec(None, *_ALL))), tree)

    def as_chunk(self, tree: Any) -> Any:
        """Keeps a chunk of a cache spread as by `to_chunk`."""
        return self.as_rows(tree, axis=1)

    def sum_over_rows(
        self, function: Callable[..., Float[Array, ""]], matrix: Float[Array, "V D"], *rows: Array
    ) -> Float[Array, ""]:
        """function(matrix, *rows), a sum over rows: each device sums its own, with the whole matrix, and gathers none.

        Args:
          function: must be a sum over the leading axis of `rows`.
          matrix: a weight, cut or not.
        """
        if self.mesh is None:
            return function(matrix, *rows)
        axis = split_axis(matrix.shape, self.fsdp)

        def own_sum(part: Array, *own_rows: Array) -> Array:
            whole = part if axis is None else jax.lax.all_gather(part, FSDP, axis=axis, tiled=True)
            return function(whole, *own_rows)[None]

        specs = (_split_spec(matrix.shape, self.fsdp), *[_ALL] * len(rows))
        # Unchecked, because a loop inside may carry a sum that begins equal on all devices and ends different.
        each = jax.shard_map(own_sum, mesh=self.mesh, in_specs=specs, out_specs=_ALL, check_vma=False)
        return jnp.sum(each(matrix, *rows))

    def _constrain(self, tree: Any, spec: PartitionSpec) -> Any:
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self._at(spec)), tree)

    def _at(self, spec: PartitionSpec) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)


ONE_DEVICE = Placement()


@functools.lru_cache
def make_placement(config: MeshConfig) -> Placement:
    """The placement of a run; without a mesh where one device is asked for.

    Raises:
      UserError: there are fewer devices, or several processes and not exactly as many devices.
    """
    wanted, found = config.n_devices, jax.device_count()
    sizes = f"mesh.data={config.data} times mesh.fsdp={config.fsdp} asks for {wanted} device(s)"
    if wanted > found:
        raise UserError(
            f"{sizes}, and there are {found}; lower them, or simulate devices on a CPU with JAX_PLATFORMS=cpu "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    if jax.process_count() > 1 and wanted != found:
        raise UserError(f"{sizes}, but the {jax.process_count()} processes have {found}; all of them must be used")
    if wanted == 1:
        return ONE_DEVICE
    shape = (config.data, config.fsdp)
    return Placement(jax.make_mesh(shape, (DATA, FSDP), (AxisType.Auto,) * 2, devices=jax.devices()[:wanted]))


def _weight_spec(path: tuple[Any, ...], shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return _split_spec(shape, fsdp) if name in MATRICES else PartitionSpec()


def _split_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    axis = split_axis(shape, fsdp)
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP)


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    """An array on the devices of a sharding, each process giving its own their part of what all of them hold."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def start_backend() -> None:
    """Settings that must stand before JAX touches a device; programs call it first.

    Compiled programs are kept, so that the next start finds them: in $STACKWISE_CACHE/compiled, unless
    JAX_COMPILATION_CACHE_DIR names another folder or JAX_ENABLE_COMPILATION_CACHE=false forbids it. JAX's pool of
    pinned host memory may take three quarters of the host's, where it would stop at 64 GiB, unless
    XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB is set. Matmuls go to the vendor's library alone, unless XLA_FLAGS says otherwise:
    timing Triton's for fp8 operands of a large block takes minutes, and none of them wins.
    """
    if TRITON_FLAG not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{TRITON_FLAG}=false".strip()
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("STACKWISE_CACHE") or "~/.cache/stackwise_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "compiled"))
    total = _meminfo("MemTotal")
    if total is not None:
        os.environ.setdefault(PINNED_LIMIT, str(max(1, int(0.75 * total / 2**30))))


def to_host(tree: Any) -> Any:
    """Copies a tree of arrays to the host, whole in every process; what held it on the device may be freed or donated.

    The copy has memory of its own: on a CPU `device_get` returns the device's, which the next step may write to.
    """
    if processes.are_several():
        return jax.tree.map(processes.to_numpy, tree)
    must_copy = True if jax.default_backend() == "cpu" else None
    return jax.tree.map(lambda leaf: np.array(leaf, copy=must_copy), jax.device_get(tree))


def to_device(tree: Any) -> Any:
    """Copies a tree of arrays to the default device."""
    return jax.device_put(tree)


def to_pinned(tree: Any) -> Any:
    """Begins copying a tree of device arrays to pinned host memory, from where the device reads at full speed."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host")), tree)


def from_pinned(tree: Any) -> Any:
    """Begins copying a tree in pinned host memory back to the device that it came from."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding.with_memory_kind("device")), tree)


def device_room() -> int | None:
    """Bytes that the first device of this process can still take; None where it has no memory of its own (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else None


def device_limit() -> int | None:
    """Bytes of the first device of this process that JAX may take; None where it has no memory of its own (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else None


def device_name() -> str:
    """What the first device of this process is called."""
    return jax.local_devices()[0].device_kind


def host_room() -> int | None:
    """Bytes of host memory that can still be taken; None where the system does not say."""
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)

"""What the live part is fed: the settled embedding and the frozen stacks, applied to rows, cached or not.

The forward programs are compiled once and shared by recomputation, by filling and by advancing: that is why a cached
number equals a recomputed one bitwise.
"""

import dataclasses
import functools
import hashlib
import shutil
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from stackwise_jax import __version__
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.order import Order
from stackwise_jax.data.pipeline import validation_batches
from stackwise_jax.memory import fingerprint, placement, processes
from stackwise_jax.memory.activations import ActivationCache, Trunk
from stackwise_jax.memory.precision import decoded
from stackwise_jax.memory.tiers import ChunkStore, DeviceStore, DiskStore, HostStore, Room, choose_tier
from stackwise_jax.objectives.objective import Task, variants
from stackwise_jax.schema import RunConfig
from stackwise_jax.train.needs import bytes_besides_cache
from stackwise_jax.train.phases import Branch, Phase
from stackwise_jax.train.plan import Plan
from stackwise_jax.train.program import Program
from stackwise_jax.train.state import Frozen
from stackwise_jax.types import Batch, Params


class Forward:
    """Compiled forward programs of frozen parts: one for the embedding, one per distinct stack shape, for each task.

    Stacks go in as `decoded` gives them: a quantised one is decoded once and not again for every batch.
    """

    def __init__(self, program: Program) -> None:
        @functools.partial(jax.jit, static_argnums=0)
        def embed(task: Task, embedding: Params, batch: Batch) -> Float[Array, "B T D"]:
            example = program.corrupt(task, batch)
            return program.apply_embedding(embedding, example.inputs, example.positions, None)

        def decode(stack: Params) -> Params:
            return decoded(stack, program.dtype, in_fp8=program.trunk_in_fp8)

        @functools.partial(jax.jit, static_argnums=0)
        def forward(
            task: Task, stack: Params, timing: Params, x: Float[Array, "B T D"], batch: Batch
        ) -> Float[Array, "B T D"]:
            return program.apply_trunk_stack(stack, x, program.context(task, program.corrupt(task, batch), timing))

        self.embed, self.forward, self.decoded = embed, forward, decode

    def trunk_output(
        self, task: Task, embedding: Params, stacks: Sequence[Params], batch: Batch
    ) -> Float[Array, "B T D"]:
        """Recomputes what the trunk puts out for a batch."""
        x = self.embed(task, embedding, batch)
        for stack in stacks:
            x = self.forward(task, self.decoded(stack), timing_of(embedding), x, batch)
        return x


def timing_of(embedding: Params) -> Params:
    """Of a settled embedding, what turns masked fractions into a vector; nothing where the model is not told them."""
    return {"time": embedding["time"]} if "time" in embedding else {}


def shard_folder(config: RunConfig, workdir: Path) -> Path:
    """Where the disk tier keeps its shards; runs that share `cache.folder` never share one."""
    if not config.cache.folder:
        return workdir / "cache"
    own = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:8]
    return Path(config.cache.folder).expanduser() / f"{workdir.name}-{own}"


def cache_tier(plan: Plan, folder: Path) -> str:
    """Chooses the tier of a run's caches by what has room now, before the run itself takes any.

    Raises:
      UserError: the cache does not fit where it is wanted, or nowhere.
    """
    if not plan.cache_bytes:
        return "device"
    config = plan.config
    free = processes.smallest_bytes(placement.device_room())
    needed = 0 if free is None else bytes_besides_cache(plan)
    host, hosts = processes.smallest_bytes(placement.host_room()), processes.count_hosts()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    room = Room(
        device=None if free is None else config.mesh.n_devices * (int(0.9 * free) - needed),
        host=None if host is None else host * hosts,
        disk=0 if config.mesh.distributed else shutil.disk_usage(existing).free,
    )
    return choose_tier(config.cache.tier, plan.cache_bytes, room)


def make_cache_store(plan: Plan, tier: str, folder: Path, report: Callable[[str], None], name: str) -> ChunkStore:
    """The store of the cache of a name, "train" or "held_out"; `report` is told of damaged shards."""
    if tier == "disk":
        return DiskStore(folder / name, report, placement.make_placement(plan.config.mesh))
    if tier == "host":
        n_chunks = plan.order.layout.chunks_per_window * variants(plan.config.objective)
        return HostStore(n_chunks if name == "train" else 1)
    return DeviceStore()


class TrunkInputs:
    """Feeds phases with what their trunk puts out, from a cache or recomputed; the validation set has a twin cache."""

    def __init__(
        self,
        program: Program,
        corpus: Corpus,
        order: Order,
        make_store: Callable[[str], ChunkStore],
    ) -> None:
        """Caches nothing yet.

        Args:
          order: of the training batches.
          make_store: the tier of the cache of that name, "train" or "held_out"; called when one is first needed.
        """
        config = program.config
        self._program, self._corpus, self._order, self._make_store = program, corpus, order, make_store
        self._place, self._forward = program.placement, Forward(program)
        self._variants = variants(config.objective)
        self.held_out = list(
            validation_batches(
                corpus.validation,
                batch_size=config.training.batch_size,
                rows=config.evaluation.rows,
                isolate_documents=config.data.isolate_documents,
            )
        )
        self._caches: dict[str, ActivationCache] = {}
        self._chain: list[str] = []  # fingerprints of the trunk that they were last brought to
        self._window: int | None = None  # of the training rows that are cached
        self._frozen = Frozen()
        self._note: Callable[[str], None] = lambda _: None
        self._embedding: Params | None = None  # on the device while a branch starts from it
        self._stack_now: Callable[[int], Params] = lambda _: {}

    def prepare(
        self,
        phase: Phase,
        frozen: Frozen,
        index: int,
        note: Callable[[str], None],
        live_stack: Callable[[int], Params | None] = lambda _: None,
    ) -> None:
        """Brings the caches to the phase's trunk; uncached, brings the trunk to the device.

        Args:
          index: number of the batch that comes next, whose window of rows is cached.
          note: is told how far long work has come, here and whenever the window changes.
          live_stack: weights of a stack that another branch of the phase trains; None: it is frozen.
        """
        self._embedding = None
        self._frozen, self._note, self._window = frozen, note, None
        uncached = [branch for branch in phase.branches if branch.reads_activations and not branch.cached]
        if uncached:
            self._embedding = self._place.to_weights(frozen.embedding)
        settled = {stack for branch in uncached for stack in branch.trunk if live_stack(stack) is None}
        on_device = {stack: self._place.to_weights(frozen.stacks[stack]) for stack in settled}

        def stack_now(stack: int) -> Params:
            return on_device[stack] if stack in on_device else typing.cast(Params, live_stack(stack))

        self._stack_now = stack_now
        if not phase.cached:
            self.clear()
            return
        branch = next(branch for branch in phase.branches if branch.cached)
        chain = self.fingerprints("train", branch, frozen)
        if chain[: len(self._chain)] != self._chain:
            self.clear()  # another band, or a trunk that was trained since: nothing of it can be advanced
        self._chain = chain
        if not self._caches:
            self._caches = {name: self._make_cache(name) for name in ("train", "held_out")}
        self._bring("held_out", branch, range(1))
        self._enter_window(branch, index)

    def clear(self) -> None:
        """Forgets the caches, also on disk: nothing will read them again."""
        for cache in self._caches.values():
            cache.clear()
        self._caches, self._chain = {}, []

    def release(self) -> None:
        """Gives up the caches and what else is on the device; what is on disk stays for the next start."""
        self._caches, self._embedding, self._stack_now = {}, None, lambda _: {}

    def training_batch(self, branch: Branch, batch: Batch, index: int) -> tuple[Batch, Array | None]:
        """Returns batch number `index` as the step must see it, and the trunk's output for it (None: from tokens)."""
        batch = as_asked(batch, branch)
        if not branch.cached:
            batch = self._place.to_rows(batch)
            return batch, self._recompute(branch, batch)
        self._enter_window(branch, index)
        variant = np.mod(batch.visits, self._variants).astype(np.int32)
        batch = dataclasses.replace(batch, visits=variant)
        placed = self._place.to_rows(batch)
        number = index // self._order.batches_per_chunk
        visits = [self._order.visit(number + ahead) for ahead in (1, 2)]
        upcoming = [(visit.chunk, visit.times % self._variants) for visit in visits]
        return placed, self._caches["train"].read(batch, upcoming=upcoming)

    def held_out_batches(self, branch: Branch) -> Iterator[tuple[Batch, Array | None]]:
        """The held-out batches with the trunk's output for them."""
        for batch in self.held_out:
            batch = as_asked(batch, branch)
            placed = self._place.to_rows(batch)
            yield placed, self._caches["held_out"].read(batch) if branch.cached else self._recompute(branch, placed)

    def _recompute(self, branch: Branch, batch: Batch) -> Array | None:
        if not branch.reads_activations:
            return None
        assert self._embedding is not None
        stacks = [self._stack_now(stack) for stack in branch.trunk]
        return self._forward.trunk_output(branch.task, self._embedding, stacks, batch)

    def _make_cache(self, name: str) -> ActivationCache:
        config, layout = self._program.config, self._order.layout
        is_train = name == "train"
        return ActivationCache(
            self._make_store(name),
            functools.partial(self._rows, name),
            rows_per_chunk=layout.rows_per_chunk if is_train else self._held_out_rows,
            batch_size=config.training.batch_size,
            n_chunks=layout.n_chunks if is_train else 1,
            variants=self._variants if is_train else 1,
            precision=config.precision.cache,
            dtype=self._program.dtype,
            placement=self._place,
        )

    @property
    def _held_out_rows(self) -> int:
        return len(self.held_out) * self._program.config.training.batch_size

    def _rows(self, name: str, row_ids: np.ndarray, variant: int) -> Batch:
        split = self._corpus.train if name == "train" else self._corpus.validation
        isolate = self._program.config.data.isolate_documents
        return self._place.to_rows(split.batch(row_ids, variant, isolate_documents=isolate))

    def _enter_window(self, branch: Branch, index: int) -> None:
        """Brings the window of batch `index` into the training cache, where it is not there yet."""
        window = self._order.window(index)
        if window == self._window:
            return
        self._window = None
        size = self._order.layout.chunks_per_window
        self._bring("train", branch, range(window * size, (window + 1) * size))
        self._window = window

    def _bring(self, name: str, branch: Branch, chunks: range) -> None:
        on_mismatch = self._program.config.cache.on_mismatch
        for work, share in self._caches[name].bring(self._trunk_of(name, branch), chunks, on_mismatch=on_mismatch):
            self._note(f"{work} the {name} cache, to the output of {len(branch.trunk)} stack(s) {100 * share:.0f}%")

    def _trunk_of(self, name: str, branch: Branch) -> Trunk:
        frozen, task, place = self._frozen, branch.task, self._place
        assert frozen.embedding is not None
        timing = timing_of(frozen.embedding)

        def embed() -> Callable[[Batch], Array]:
            embedding = place.to_weights(frozen.embedding)
            return lambda batch: self._forward.embed(task, embedding, as_asked(batch, branch))

        def stack(number: int) -> Callable[[Array, Batch], Array]:
            own = self._forward.decoded(place.to_weights(frozen.stacks[number]))  # once for all rows that pass it
            own_timing = place.to_weights(timing)
            return lambda x, batch: self._forward.forward(task, own, own_timing, x, as_asked(batch, branch))

        chain = self.fingerprints(name, branch, frozen)
        return Trunk(chain, embed, [functools.partial(stack, number) for number in branch.trunk])

    def fingerprints(self, name: str, branch: Branch, frozen: Frozen) -> list[str]:
        """f_0 .. f_k of a trunk of k stacks: what a cache at each depth must have been computed from."""
        config, corpus = self._program.config, self._corpus
        split = corpus.train if name == "train" else corpus.validation
        layout = self._order.layout
        chain = [
            fingerprint.root(
                {
                    "code": __version__,
                    "corpus": split.digest,
                    "rows": [layout.n_rows, layout.rows_per_chunk] if name == "train" else self._held_out_rows,
                    "seq_len": config.data.seq_len,
                    "isolate_documents": config.data.isolate_documents,
                    "tokenizer": corpus.tokenizer.digest,
                    "seed": config.seed,
                    "objective": dataclasses.asdict(config.objective),
                    "task": dataclasses.asdict(branch.task),
                    "band": branch.band,
                    "model": dataclasses.asdict(config.model),
                    "precision": dataclasses.asdict(config.precision),
                    "mesh": [config.mesh.data, config.mesh.fsdp],  # sums are rounded in another order
                    "embedding": frozen.digests["embedding"],
                }
            )
        ]
        for stack in branch.trunk:
            chain.append(fingerprint.extend(chain[-1], frozen.digests[str(stack)]))
        return chain


def as_asked(batch: Batch, branch: Branch) -> Batch:
    """The batch with the band of masked fractions and the opened part of rows that a branch asks for, if any."""
    B, T = batch.tokens.shape
    if branch.band is not None:
        batch = dataclasses.replace(batch, bands=np.tile(np.array(branch.band, np.float32), (B, 1)))
    if branch.opened is not None:
        batch = dataclasses.replace(batch, prefix_lengths=np.full(B, round(branch.opened * T), np.int32))
    return batch

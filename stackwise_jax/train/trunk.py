"""What the live part is fed: the settled embedding and the frozen stacks, applied to rows, cached or not.

The forward programs are compiled once and shared by recomputation, by filling and by advancing: that is why a cached
number equals a recomputed one bitwise.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from stackwise_jax import __version__
from stackwise_jax.data.corpus import Corpus
from stackwise_jax.data.pipeline import Order, validation_batches
from stackwise_jax.memory import fingerprint
from stackwise_jax.memory.activations import ActivationCache, DeviceStore
from stackwise_jax.memory.placement import to_device
from stackwise_jax.memory.precision import DTYPES
from stackwise_jax.models.rack import apply_embedding
from stackwise_jax.models.stack import apply_stack
from stackwise_jax.objectives.objective import variants
from stackwise_jax.train.curriculum import Phase
from stackwise_jax.train.state import Frozen
from stackwise_jax.train.step import Program
from stackwise_jax.types import Batch, Params


class Forward:
    """Compiled forward programs of frozen parts: one for the embedding, one per distinct stack shape."""

    def __init__(self, program: Program) -> None:
        model, dtype = program.config.model, program.dtype

        @jax.jit
        def embed(embedding: Params, batch: Batch) -> Float[Array, "B T D"]:
            example = program.corrupt(program.mask_key, batch)
            return apply_embedding(embedding, example.inputs, example.positions, model, dtype=dtype)

        @jax.jit
        def forward(stack: Params, x: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B T D"]:
            return apply_stack(stack, x, program.context(batch), model, dtype=dtype)

        self.embed, self.forward = embed, forward

    def trunk_output(self, embedding: Params, stacks: Sequence[Params], batch: Batch) -> Float[Array, "B T D"]:
        """Recomputes what the trunk puts out for a batch."""
        x = self.embed(embedding, batch)
        for stack in stacks:
            x = self.forward(stack, x, batch)
        return x


class TrunkInputs:
    """Feeds phases with what their trunk puts out, from a cache or recomputed; the validation set has a twin cache."""

    def __init__(self, program: Program, corpus: Corpus, order: Order) -> None:
        config = program.config
        self._program, self._corpus, self._order = program, corpus, order
        self._forward = Forward(program)
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
        self._embedding: Params | None = None  # with the trunk, on the device while a phase recomputes
        self._trunk: list[Params] = []

    def prepare(self, phase: Phase, frozen: Frozen, note: Callable[[str], None]) -> None:
        """Brings the caches to the phase's trunk, by an advance or a rebuild; uncached, the trunk to the device."""
        self._embedding, self._trunk = None, []
        if not phase.cached:
            self._caches = {}
            if phase.reads_activations:
                assert frozen.embedding is not None
                self._embedding = to_device(frozen.embedding)
                self._trunk = [to_device(frozen.stacks[stack]) for stack in phase.trunk]
            return
        if not self._caches:
            self._caches = {"train": self._make_cache("train"), "held out": self._make_cache("held out")}
        for name, cache in self._caches.items():
            self._bring(name, cache, phase.trunk, frozen, note)

    def release(self) -> None:
        """Gives up the caches and what else is on the device."""
        self._caches, self._embedding, self._trunk = {}, None, []

    def training_batch(self, phase: Phase, batch: Batch, index: int) -> tuple[Batch, Array | None]:
        """Returns batch number `index` as the step must see it, and the trunk's output for it (None: from tokens)."""
        if phase.cached:
            variant = np.mod(batch.visits, self._variants).astype(np.int32)
            batch = dataclasses.replace(batch, visits=variant)
            return batch, self._caches["train"].read(batch)
        return batch, self._recompute(batch)

    def held_out_batches(self, phase: Phase) -> Iterator[tuple[Batch, Array | None]]:
        """The held-out batches with the trunk's output for them."""
        for batch in self.held_out:
            yield batch, self._caches["held out"].read(batch) if phase.cached else self._recompute(batch)

    def _recompute(self, batch: Batch) -> Array | None:
        if self._embedding is None:
            return None
        return self._forward.trunk_output(self._embedding, self._trunk, batch)

    def _make_cache(self, name: str) -> ActivationCache:
        config = self._program.config
        rows = len(self.held_out) * config.training.batch_size
        return ActivationCache(
            DeviceStore(),
            functools.partial(self._rows, name),
            n_rows=self._order.layout.n_rows if name == "train" else rows,
            rows_per_chunk=self._order.layout.rows_per_chunk if name == "train" else rows,
            batch_size=config.training.batch_size,
            variants=self._variants if name == "train" else 1,
            dtype=DTYPES[config.precision.cache],
        )

    def _rows(self, name: str, row_ids: np.ndarray, variant: int) -> Batch:
        split = self._corpus.train if name == "train" else self._corpus.validation
        return split.batch(row_ids, variant, isolate_documents=self._program.config.data.isolate_documents)

    def _bring(
        self, name: str, cache: ActivationCache, trunk: tuple[int, ...], frozen: Frozen, note: Callable[[str], None]
    ) -> None:
        chain = self.fingerprints(name, trunk, frozen)
        if cache.fingerprint == chain[-1]:
            return
        start = next((depth for depth in range(len(trunk)) if cache.fingerprint == chain[depth]), None)
        if start is None:
            cache.require(chain[-1], on_mismatch=self._program.config.cache.on_mismatch)
            assert frozen.embedding is not None
            embedding = to_device(frozen.embedding)
            for share in cache.fill(lambda batch: self._forward.embed(embedding, batch), chain[0]):
                note(f"filling the {name} cache {100 * share:.0f}%")
            start = 0
        for depth in range(start, len(trunk)):
            forward = functools.partial(self._forward.forward, to_device(frozen.stacks[trunk[depth]]))
            for share in cache.advance(forward, chain[depth + 1]):
                note(f"advancing the {name} cache through stack {trunk[depth]} {100 * share:.0f}%")

    def fingerprints(self, name: str, trunk: tuple[int, ...], frozen: Frozen) -> list[str]:
        """f_0 .. f_k of a trunk of k stacks: what a cache at each depth must have been computed from."""
        config, corpus = self._program.config, self._corpus
        split = corpus.train if name == "train" else corpus.validation
        chain = [
            fingerprint.root(
                {
                    "code": __version__,
                    "corpus": split.digest,
                    "rows": self._order.layout.n_rows
                    if name == "train"
                    else len(self.held_out) * config.training.batch_size,
                    "seq_len": config.data.seq_len,
                    "isolate_documents": config.data.isolate_documents,
                    "tokenizer": corpus.tokenizer.digest,
                    "seed": config.seed,
                    "objective": dataclasses.asdict(config.objective),
                    "model": dataclasses.asdict(config.model),
                    "precision": dataclasses.asdict(config.precision),
                    "embedding": frozen.digests["embedding"],
                }
            )
        ]
        for stack in trunk:
            chain.append(fingerprint.extend(chain[-1], frozen.digests[str(stack)]))
        return chain

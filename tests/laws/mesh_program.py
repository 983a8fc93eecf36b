"""What `test_mesh.py` looks at, computed by one process with eight simulated devices; prints JSON.

python tests/laws/mesh_program.py FOLDER CONFIG     (CONFIG: the JSON of a tiny config)
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np

from stackwise_jax import config as config_lib
from stackwise_jax.data.corpus import prepare_corpus
from stackwise_jax.memory.activations import ActivationCache, Trunk
from stackwise_jax.memory.placement import ONE_DEVICE, Placement, make_placement
from stackwise_jax.memory.processes import start_processes
from stackwise_jax.memory.tiers import DeviceStore
from stackwise_jax.models.rack import init_rack
from stackwise_jax.objectives.objective import Task
from stackwise_jax.schema import ExpertsConfig, MeshConfig, RunConfig
from stackwise_jax.train import loop
from stackwise_jax.train.chain_programs import ChainPrograms
from stackwise_jax.train.chained import ChainedGradients
from stackwise_jax.train.optimizer import init_part, make_transforms, update_part
from stackwise_jax.train.phases import Role, Signature
from stackwise_jax.train.program import Program
from stackwise_jax.train.step import make_gradients
from stackwise_jax.types import Batch, Vocabulary

LIVE = Role.LIVE
SIGNATURE = Signature(False, ((2, LIVE),), LIVE, LIVE, False, "fused", Task("clm", "causal"))
NO_MESH = MeshConfig()
UNLIKE = {"window": 4, "global_every": 2, "first_attention_norm": False, "embedding_norm": True, "token_types": 2}
UNLIKE |= {"norm": "layernorm", "norm_bias": False, "ffn": "geglu_erf", "head_transform": True, "logit_bias": True}


def with_mesh(config: RunConfig, mesh: MeshConfig, **sections: dict[str, Any]) -> RunConfig:
    """The config on a mesh, with other fields of sections."""
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return config_lib.resolve(dataclasses.asdict(dataclasses.replace(config, mesh=mesh, **changed)))


def difference(one: Any, other: Any) -> float:
    """The largest difference of any array, as a share of its largest entry."""
    pairs = zip(jax.tree.leaves(jax.device_get(one)), jax.tree.leaves(jax.device_get(other)), strict=True)
    return max(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-12)) for a, b in pairs)


# The gradient law, and what must break it.


def gradients(config: RunConfig, mesh: MeshConfig, *, chained: bool = False) -> Any:
    """(gradients, loss, weight) of a tied causal rack with dropout, in two micro-batches."""
    config = with_mesh(config, mesh, model={"dropout": 0.1, "ties_embedding": True}, training={"accumulation_steps": 2})
    program = Program(config, Vocabulary(320, 4, (0, 1, 2, 3, 4)), n_rows=8)
    B, T = config.training.batch_size, config.data.seq_len
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 320, (B, T)).astype(np.int32)
    lengths = draw.integers(4, T + 1, (B, 1))  # devices get rows of different weight
    places = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    segments = (places < lengths).astype(np.int32)
    batch = Batch(tokens, segments, places, np.arange(B, dtype=np.int32), np.zeros(B, np.int32))
    rack = init_rack(jax.random.key(3), config.model, (2,))
    place = program.placement
    key = program.dropout_key(jnp.int32(7))
    fused, of_chain = jax.jit(make_gradients(program, SIGNATURE)), ChainedGradients(ChainPrograms(program), SIGNATURE)
    make = of_chain if chained else fused
    return make(place.to_weights(rack), {"frozen_stacks": []}, place.to_rows(batch), None, key)


def gradient_differences(config: RunConfig) -> dict[str, float]:
    """Of each mesh from one device; "twin": only the first device's rows count in the loss."""
    alone = gradients(config, NO_MESH)
    found = {
        "1x8": difference(gradients(config, MeshConfig(1, 8)), alone),
        "2x4": difference(gradients(config, MeshConfig(2, 4)), alone),
        "2x1 chained": difference(gradients(config, MeshConfig(2, 1), chained=True), alone),
    }
    unlike = with_mesh(config, NO_MESH, model=UNLIKE)
    routed = with_mesh(config, NO_MESH, model={"experts": ExpertsConfig(count=4, shared=1, balance=0.5, z_loss=0.1)})
    found["2x4 experts"] = difference(gradients(routed, MeshConfig(2, 4)), gradients(routed, NO_MESH))
    found["2x4 unlike blocks"] = difference(gradients(unlike, MeshConfig(2, 4)), gradients(unlike, NO_MESH))

    def first_only(self: Placement, function: Callable[..., Any], matrix: Any, *rows: Any) -> Any:
        share = jax.tree.map(lambda leaf: leaf[: leaf.shape[0] // self.n_devices], rows)
        return function(matrix, *share)

    right, Placement.sum_over_rows = Placement.sum_over_rows, first_only
    found["twin"] = difference(gradients(config, MeshConfig(2, 1)), alone)
    Placement.sum_over_rows = right
    return found


def muon_difference(config: RunConfig) -> float:
    """Of one update of a stack by Muon, which multiplies whole matrices."""
    config = with_mesh(config, NO_MESH, optimizer={"name": "muon"})
    transform = make_transforms(config, scales_head=False)["stacks"]
    stack = init_rack(jax.random.key(3), config.model, (2,))["stacks"][0]
    grads = init_rack(jax.random.key(4), config.model, (2,))["stacks"][0]
    place = make_placement(MeshConfig(2, 4))

    def update(grads: Any, params: Any) -> Any:
        state = init_part({"stack": transform}, "stack", params)
        return update_part(transform, grads, state, params, jnp.float32(1.0))

    return difference(jax.jit(update)(place.to_weights(grads), place.to_weights(stack)), jax.jit(update)(grads, stack))


# What each device holds.


def shares(tree: Any) -> list[float]:
    """The share of each array that lies on the device that has most of it."""
    return [
        max(shard.data.nbytes for shard in leaf.addressable_shards) / leaf.nbytes
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim
    ]


def weight_shares(config: RunConfig) -> dict[str, list[float]]:
    """Of matrices, of vectors, and of all optimiser state of a state that was drawn on a mesh."""
    from stackwise_jax.train.curriculum import make_curriculum
    from stackwise_jax.train.state import Frozen, PartSource

    config = with_mesh(config, MeshConfig(2, 4))
    source = PartSource(config, jax.random.key(0))
    lasting, grown, *_ = (source.begin(phase, {}, Frozen(), head_has_table=True) for phase in make_curriculum(config))
    stack, moments = grown[0][0], lasting["embedding"][1][0].mu
    matrices = [stack["mlp"]["up"]["kernel"], stack["attention"]["key"]["kernel"], lasting["head"][0]["table"]]
    return {"matrices": shares(matrices), "vectors": shares(stack["mlp_norm"]), "moments": shares(moments)}


def chunk_shares(storage: str) -> dict[str, Any]:
    """Of the chunks of a cache, and how its rows differ from those of a cache on one device."""
    embed = jax.jit(lambda batch: jnp.sin(batch.tokens[:, :, None] + jnp.arange(8.0)[None, None, :]))

    def rows(place: Placement, row_ids: np.ndarray, variant: int) -> Batch:
        tokens = np.arange(16)[None] + 100.0 * row_ids[:, None] + variant
        ones = np.ones((len(row_ids), 16), np.int32)
        return place.to_rows(Batch(tokens, ones, ones, row_ids, np.full(len(row_ids), variant)))

    read = []
    for place in (make_placement(MeshConfig(4, 2)), ONE_DEVICE):
        store = DeviceStore()
        cache = ActivationCache(
            store, lambda ids, variant, place=place: rows(place, ids, variant), rows_per_chunk=16, batch_size=8,
            n_chunks=2, variants=1, precision=storage, dtype=jnp.float32, placement=place,
        )  # fmt: skip
        list(cache.bring(Trunk(["f"], lambda: embed, []), range(2), on_mismatch="stop"))
        ids = np.array([19, 30, 16, 31, 22, 25, 27, 20])
        read.append(cache.read(dataclasses.replace(rows(ONE_DEVICE, ids, 0), row_ids=ids)))
        if place.mesh is not None:
            held = [shares(store.read(chunk)) for chunk in (0, 1)]
    return {"shares": held[0] + held[1], "difference": difference(read[0], read[1])}


# Whole runs.


class StoppedError(Exception):
    """Ends a run from inside, as a power cut would."""


def losses(folder: Path) -> dict[int, float]:
    """{step: loss} of everything that a run trained."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def furthest(found: dict[int, float], wanted: dict[int, float]) -> float:
    """The largest relative difference of losses; infinite where steps are missing."""
    if set(found) != set(wanted):
        return float("inf")
    return max(abs(found[step] / wanted[step] - 1) for step in wanted)


def run_differences(config: RunConfig, folder: Path) -> dict[str, float]:
    """Layer-wise, masked, cached: losses of a run that is stopped on one mesh and continued on others."""
    corpus = prepare_corpus(config, report=lambda _: None)

    def run(name: str, mesh: MeshConfig, tier: str, *, stop: int | None = None) -> dict[int, float]:
        one = loop.Run(with_mesh(config, mesh, cache={"tier": tier}), corpus, folder / name, lambda _: None)
        if stop is not None:
            one.batches = until(one.batches, stop)
        with contextlib.suppress(StoppedError):
            one.to_end()
        return losses(folder / name)

    alone = run("alone", NO_MESH, "device")
    run("begun", MeshConfig(4, 2), "host", stop=9)  # the newest snapshot lies a step before, inside the last phase
    found = {}
    for name, mesh, tier in (("1x1 device", NO_MESH, "device"), ("8x1 disk", MeshConfig(8, 1), "disk")):
        shutil.copytree(folder / "begun", folder / name)
        found[f"4x2 host, then {name}"] = furthest(run(name, mesh, tier), alone)
    return found


def until(batches: Iterator[Batch], stop: int) -> Iterator[Batch]:
    """The first `stop` batches."""
    yield from itertools.islice(batches, stop)
    raise StoppedError


def main(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Everything."""
    causal = with_mesh(config, NO_MESH, objective={"name": "clm"}, model={"attention": "causal"})
    return {
        "gradients": gradient_differences(causal),
        "muon": muon_difference(config),
        "weights": weight_shares(config),
        "chunks": {storage: chunk_shares(storage) for storage in ("fp32", "fp8")},
        "runs": run_differences(config, folder),
    }


if __name__ == "__main__":
    start_processes(MeshConfig(data=8))
    print(json.dumps(main(Path(sys.argv[1]), config_lib.from_json(Path(sys.argv[2])))))

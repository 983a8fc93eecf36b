"""Fingerprints move with everything that a cached number depends on, and with nothing else."""

import hashlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from stackwise_jax.memory.fingerprint import array_digests, extend, named_leaves, root, tree_digest

TREE: dict[str, Any] = {"attention": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "scale": np.ones(2)}


def changed(value: np.ndarray) -> dict[str, Any]:
    return {**TREE, "attention": {"kernel": value}}


KERNEL = TREE["attention"]["kernel"]


@pytest.mark.parametrize(
    "other",
    [
        changed(np.where(KERNEL == 5, np.nextafter(KERNEL, np.float32(9)), KERNEL)),
        changed(-KERNEL),  # -0.0 in the first place besides
        changed(np.ascontiguousarray(KERNEL.reshape(3, 2))),
        changed(KERNEL.astype(np.float64)),
        changed(KERNEL.view(np.int32)),
        {"attention": {"kernels": KERNEL}, "scale": TREE["scale"]},
        {"attention": {}, "kernel": KERNEL, "scale": TREE["scale"]},
        {**TREE, "bias": np.zeros(0)},
        {"attention": TREE["attention"]},
    ],
    ids=["value", "sign", "shape", "dtype", "same bytes", "name", "place", "empty array", "missing"],
)
def test_digest_moves_with_value_name_shape_and_dtype(other: dict[str, Any]):
    assert tree_digest(other) != tree_digest(TREE)


def test_digest_is_that_of_the_numbers_however_they_lie():
    transposed = np.asfortranarray(KERNEL)
    assert tree_digest(changed(transposed)) == tree_digest(TREE)
    assert tree_digest(changed(jnp.array(KERNEL))) == tree_digest(TREE)  # type: ignore[arg-type]
    assert tree_digest(dict(reversed(TREE.items()))) == tree_digest(TREE)
    padded = np.zeros((2, 6), np.float32)
    padded[:, ::2] = KERNEL
    assert tree_digest(changed(padded[:, ::2])) == tree_digest(TREE)


def test_digest_reads_every_kind_of_array():
    digests = {
        tree_digest({"x": value})
        for value in (
            np.float32(1),
            np.float32(2),
            np.zeros(0),
            np.zeros((0, 3)),
            np.zeros(1),
            jnp.zeros(1, jnp.bfloat16),
        )
    }
    assert len(digests) == 6


def test_digest_is_a_plain_sha256_of_names_and_bytes():
    """Written out, so that a change of the format, which makes every stored cache and stack foreign, is deliberate."""
    value = np.array([1, 2], np.int32)
    of_array = hashlib.sha256(b"a/b int32 (2,)\n" + value.tobytes()).hexdigest()
    assert array_digests({"a": {"b": value}}) == {"a/b": of_array}
    assert tree_digest({"a": {"b": value}}) == hashlib.sha256(f"a/b {of_array}\n".encode()).hexdigest()


def test_names_are_paths():
    assert set(named_leaves({"stacks": [{"mlp": {"up": 1}}, {"norm": 2}]})) == {"stacks/0/mlp/up", "stacks/1/norm"}


FACTS: dict[str, Any] = {
    "code": "0.1.0",
    "corpus": "c",
    "rows": 8,
    "tokenizer": "t",
    "seed": 0,
    "objective": {"name": "mlm", "rate_min": 0.15},
    "precision": {"cache": "fp32"},
    "embedding": "e",
}


@pytest.mark.parametrize(
    "change",
    [
        {"code": "0.1.1"},
        {"corpus": "d"},
        {"rows": 9},
        {"tokenizer": "u"},
        {"seed": 1},
        {"objective": {"name": "mlm", "rate_min": 0.16}},
        {"precision": {"cache": "bf16"}},
        {"embedding": "f"},
        {"rows": "8"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_root_moves_with_every_fact(change: dict[str, Any]):
    assert root({**FACTS, **change}) != root(FACTS)
    assert root(dict(reversed(FACTS.items()))) == root(FACTS)


def test_the_chain_tells_every_stack_and_their_order():
    f0 = root(FACTS)
    chains = {extend(extend(f0, a), b) for a in ("1", "2") for b in ("1", "2")}
    assert len(chains) == 4
    assert not chains & {f0, extend(f0, "1"), extend(f0, "2")}

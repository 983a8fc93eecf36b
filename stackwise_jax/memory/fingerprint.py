"""Digests that say what a cached activation was computed from.

f_0 hashes everything that decides what the embedding puts out; f_k hashes f_{k-1} and the digest of stack k as
stored. Two caches with the same fingerprint hold the same numbers, whatever order rows were visited in.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

_HASHERS = ThreadPoolExecutor(8, thread_name_prefix="hashing")  # which runs outside of Python's lock


def array_digest(name: str, array: Any) -> str:
    """SHA-256 over an array's name, dtype, shape and bytes in C order; hexadecimal."""
    array = np.asarray(array)
    hasher = hashlib.sha256(f"{name} {array.dtype} {array.shape}\n".encode())
    hasher.update(np.ascontiguousarray(array).view(np.uint8).data if array.ndim else array.tobytes())
    return hasher.hexdigest()


def array_digests(tree: Any) -> dict[str, str]:
    """{name: digest} of every array of a tree: the one time that its bytes are hashed, several arrays at once."""
    named = named_leaves(tree)
    return dict(zip(named, _HASHERS.map(array_digest, named, named.values()), strict=True))


def join_digests(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines "name digest" in the order of their names: a tree's digest from those of its arrays."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def tree_digest(tree: Any) -> str:
    """The digest of a tree: of the names, dtypes, shapes and bytes of every array."""
    return join_digests(array_digests(tree))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Flattens a tree to {"attention/query/kernel": array}; the names are those in a checkpoint."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def root(facts: dict[str, Any]) -> str:
    """f_0 from JSON-able facts: everything that decides what the embedding puts out, and this code's version."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def extend(fingerprint: str, stack_digest: str) -> str:
    """f_k from f_{k-1} and the digest of stack k as stored."""
    return hashlib.sha256(f"{fingerprint} {stack_digest}".encode()).hexdigest()

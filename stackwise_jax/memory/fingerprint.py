"""Digests that say what a cached activation was computed from.

f_0 hashes everything that decides what the embedding puts out; f_k hashes f_{k-1} and the digest of stack k as
stored. Two caches with the same fingerprint hold the same numbers, whatever order rows were visited in.
"""

import hashlib
import json
from typing import Any

import jax
import numpy as np


def tree_digest(tree: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every array, in the order of their names; hexadecimal."""
    hasher = hashlib.sha256()
    for name, leaf in sorted(named_leaves(tree).items()):
        array = np.asarray(leaf)
        hasher.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hasher.update(np.ascontiguousarray(array).view(np.uint8).data if array.ndim else array.tobytes())
    return hasher.hexdigest()


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

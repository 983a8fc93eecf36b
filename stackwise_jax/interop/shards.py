"""Folders of safetensors files: one array read at a time, one file written at a time.

A folder holds `model.safetensors`, or shards and `model.safetensors.index.json`, which says in which one an array lies.
Pickle files (.bin, .pt) run code when they are read and are refused.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stackwise_jax.errors import UserError
from stackwise_jax.interop.names import HostArray
from stackwise_jax.train.checkpoint import write_text

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def import_safetensors() -> Any:
    """The `safetensors` package with its numpy flavour; UserError where it is not installed."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError('weights are read and written by the package safetensors: pip install -e ".[hf]"') from None
    return safetensors


class Shards:
    """The arrays of a folder, mapped into memory and read one by one.

    Attributes:
      names: of all arrays.

    Raises:
      UserError: no safetensors, pickle files instead, an index that points out of the folder, or a damaged file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._safetensors = folder, import_safetensors()
        self._open: dict[str, Any] = {}
        self._file_of = self._read_index() if (folder / INDEX).exists() else self._read_single()
        self.names = frozenset(self._file_of)

    def _read_single(self) -> dict[str, str]:
        if (self._folder / SINGLE).exists():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{self._folder / pickles[0]} is a pickle, which can run code when it is read; save the model again as "
                "safetensors (transformers: from_pretrained, then save_pretrained)"
            )
        raise UserError(f"{self._folder} holds neither {SINGLE} nor {INDEX}")

    def _read_index(self) -> dict[str, str]:
        path = self._folder / INDEX
        try:
            files = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read as an index of shards: {error}") from None
        for file in set(files.values()):
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{path} names {file!r}, which is no safetensors file beside it")
            lacking = {name for name, own in files.items() if own == file} - set(self._file(file).keys())
            if lacking:
                raise UserError(f"{self._folder / file} lacks {min(lacking)}, which {INDEX} says it holds")
        return files

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._folder / name
            try:
                self._open[name] = self._safetensors.safe_open(path, framework="np")
            except FileNotFoundError:
                raise UserError(f"{path} is missing") from None
            except (OSError, self._safetensors.SafetensorError) as error:
                raise UserError(f"{path} is not a sound safetensors file: {error}") from None
        return self._open[name]

    def dtype(self, name: str) -> str:
        """fp32, bf16 or fp16; UserError for an array of another kind."""
        found = self._file(self._file_of[name]).get_slice(name).get_dtype()
        if found not in DTYPES:
            raise UserError(f"{self._folder}: {name} is {found}; weights must be one of: {', '.join(DTYPES)}")
        return DTYPES[found]

    def read(self, name: str) -> HostArray:
        """An array, as it is stored."""
        return self._file(self._file_of[name]).get_tensor(name)


def plan_shards(sizes: Sequence[tuple[str, int]], shard_bytes: int) -> list[list[str]]:
    """Groups (name, bytes), in order, into shards of at most `shard_bytes`, or of one larger array."""
    shards: list[list[str]] = []
    left = 0
    for name, size in sizes:
        if not shards or size > left:
            shards.append([])
            left = shard_bytes
        shards[-1].append(name)
        left -= size
    return shards


def write_shards(
    folder: Path, arrays: Iterator[tuple[str, HostArray]], sizes: Sequence[tuple[str, int]], shard_bytes: int
) -> list[str]:
    """Writes arrays, which come in the order of `sizes`, holding one shard's at a time.

    Returns:
      the names of the files.

    Raises:
      ValueError: other arrays come, or of other sizes.
    """
    save_file = import_safetensors().numpy.save_file
    shards, size_of = plan_shards(sizes, shard_bytes), dict(sizes)
    files, weight_map = [], {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held: dict[str, np.ndarray] = {}
        for expected in names:
            name, array = next(arrays)
            if (name, array.nbytes) != (expected, size_of[expected]):
                raise ValueError(f"{name} of {array.nbytes} bytes came where {expected} was to come")
            held[name] = array
        save_file(held, folder / file, metadata={"format": "pt"})
        files.append(file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(size_of.values())}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return files

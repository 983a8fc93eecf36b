"""A file of rows that is never trusted unread: every block of it is compared with its digest when it is first read.

Opening costs nothing but the digests (32 bytes a block of 256 KiB), so it does not grow with what is read; damage is
found before a damaged row is used.
"""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt

from stackwise_jax.errors import UserError

BLOCK_BYTES = 2**18
DIGEST_BYTES = 32
REMEDY = "`python -m stackwise_jax.prepare` with the same config repairs it (a data.prepared folder: copy it again)"


class BlockWriter:
    """Appends bytes to a file and keeps the sha256 of every block; the last one may be short."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._block, self._room = hashlib.sha256(), BLOCK_BYTES
        self._digests: list[bytes] = []

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        """Appends."""
        self._file.write(data)
        view = memoryview(data)
        while view:
            part, view = view[: self._room], view[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self._digests.append(self._block.digest())
                self._block, self._room = hashlib.sha256(), BLOCK_BYTES

    def digests(self) -> bytes:
        """The digests of all blocks, one after another; nothing may be written after this."""
        self._file.flush()
        return b"".join(self._digests if self._room == BLOCK_BYTES else [*self._digests, self._block.digest()])


class CheckedRows:
    """Rows of a memory-mapped file as `array[row_ids]`; UserError when a block that they lie in is damaged.

    Attributes:
      shape: rows, items a row.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int], digests: bytes) -> None:
        """Maps the file.

        Raises:
          UserError: it cannot be read, or its size is not that of `shape`.
        """
        self.path, self.shape = path, shape
        self._row_bytes = shape[1] * np.dtype(dtype).itemsize
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {REMEDY}") from None
        if len(self._bytes) != shape[0] * self._row_bytes:
            raise UserError(f"{path} is damaged: {len(self._bytes)} bytes, not {shape[0] * self._row_bytes}; {REMEDY}")
        self._rows = self._bytes.view(dtype).reshape(shape)
        self._digests = digests
        self._is_checked = np.zeros(-(-len(self._bytes) // BLOCK_BYTES), bool)

    def __getitem__(self, row_ids: Int[np.ndarray, "B"]) -> UInt[np.ndarray, "B T"]:
        first = row_ids.astype(np.int64) * self._row_bytes // BLOCK_BYTES
        last = ((row_ids.astype(np.int64) + 1) * self._row_bytes - 1) // BLOCK_BYTES
        most = (self._row_bytes - 1) // BLOCK_BYTES + 2  # blocks that a row may touch
        touched = np.minimum(first[:, None] + np.arange(most)[None, :], last[:, None])
        for block in np.unique(touched[~self._is_checked[touched]]):
            self._check(int(block))
        return self._rows[row_ids]

    def check_all(self) -> None:
        """Reads the whole file; UserError at the first damaged block."""
        for block in range(len(self._is_checked)):
            self._check(block)

    @property
    def checked_blocks(self) -> int:
        """How many blocks have been read and found whole."""
        return int(self._is_checked.sum())

    def _check(self, block: int) -> None:
        begin = block * BLOCK_BYTES
        digest = hashlib.sha256(self._bytes[begin : begin + BLOCK_BYTES]).digest()
        if digest != self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            raise UserError(f"{self.path} is damaged in its bytes from {begin} on; {REMEDY}")
        self._is_checked[block] = True

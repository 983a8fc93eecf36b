"""A file of rows that is never trusted unread: every block of it is compared with its digest when it is first read.

Opening costs nothing but the digests (32 bytes a block of 256 KiB), so it does not grow with what is read; damage is
found before a damaged row is used.
"""

import hashlib
import os
import weakref
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
    """Rows of a file as `array[row_ids]`; UserError when a block that they lie in is damaged.

    Rows are read, not mapped: a file that shrinks or a disk that fails is then an error and not the end of the process.

    Attributes:
      path: the file.
      shape: rows, items a row.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, int], digests: bytes) -> None:
        """Opens the file.

        Raises:
          UserError: it cannot be read, or its size is not that of `shape`.
        """
        self.path, self.shape = path, shape
        self._dtype, self._row_bytes = np.dtype(dtype), shape[1] * np.dtype(dtype).itemsize
        self._n_bytes = shape[0] * self._row_bytes
        self._digests = digests
        self._is_checked = np.zeros(-(-self._n_bytes // BLOCK_BYTES), bool)
        try:
            self._file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._file)
            n_bytes = os.fstat(self._file).st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from None
        if n_bytes != self._n_bytes:
            raise UserError(f"{path} is damaged: {n_bytes} bytes, not {self._n_bytes}; {REMEDY}")

    def __getitem__(self, row_ids: Int[np.ndarray, "B"]) -> UInt[np.ndarray, "B T"]:
        begins = row_ids.astype(np.int64) * self._row_bytes
        first, last = begins // BLOCK_BYTES, (begins + self._row_bytes - 1) // BLOCK_BYTES
        most = (self._row_bytes - 1) // BLOCK_BYTES + 2  # blocks that a row may touch
        touched = np.minimum(first[:, None] + np.arange(most)[None, :], last[:, None])
        for block in np.unique(touched[~self._is_checked[touched]]):
            self._check(int(block))
        rows = np.empty((len(row_ids), self.shape[1]), self._dtype)
        for row, begin in zip(rows, begins.tolist(), strict=True):
            row[:] = np.frombuffer(self._read(begin, self._row_bytes), self._dtype)
        return rows

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
        digest = hashlib.sha256(self._read(begin, min(BLOCK_BYTES, self._n_bytes - begin))).digest()
        if digest != self._digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            raise UserError(f"{self.path} is damaged in its bytes from {begin} on; {REMEDY}")
        self._is_checked[block] = True

    def _read(self, begin: int, n_bytes: int) -> bytes:
        try:
            data = os.pread(self._file, n_bytes, begin)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror or error}); {REMEDY}") from None
        if len(data) != n_bytes:
            raise UserError(f"{self.path} has been cut short while it was used; {REMEDY}")
        return data

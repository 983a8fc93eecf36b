"""Number formats by lists of their numbers, in NumPy alone, to compare storage formats and fp8 matmuls with."""

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])
E5M2 = np.array([(m / 4 if e == 0 else 1 + m / 4) * 2.0 ** (max(e, 1) - 15) for e in range(31) for m in range(4)])
# Dettmers et al. (2023), appendix E.
NF4 = np.array([
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
])  # fmt: skip


def nearest(x: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Rounds to a signed format given by its numbers from 0 up; ties to the even one, beyond the last: the last."""
    magnitudes = np.abs(x).astype(np.float64)
    above = np.clip(np.searchsorted(numbers, magnitudes), 1, len(numbers) - 1)
    excess = (magnitudes - numbers[above - 1]) - (numbers[above] - magnitudes)
    goes_up = (excess > 0) | ((excess == 0) & (above % 2 == 0))
    return np.copysign(np.where(goes_up, numbers[above], numbers[above - 1]), x)


def fp8(w: np.ndarray, block: int = 128) -> np.ndarray:
    """A matrix through E4M3 in square blocks."""
    out = np.zeros_like(w, np.float64)
    for i in range(0, w.shape[0], block):
        for j in range(0, w.shape[1], block):
            part = w[i : i + block, j : j + block]
            scale = np.abs(part).max() / np.float32(448) if np.any(part) else np.float32(1)
            out[i : i + block, j : j + block] = nearest(part / scale, E4M3) * scale
    return out


def nvfp4(w: np.ndarray, block: int = 16) -> np.ndarray:
    """A matrix through E2M1, column by column in blocks of rows."""
    matrix = np.abs(w).max() / np.float32(448 * 6) if np.any(w) else np.float32(1)
    out = np.zeros_like(w, np.float64)
    for i in range(0, w.shape[0], block):
        for j in range(w.shape[1]):
            part = w[i : i + block, j]
            step = np.float32(max(nearest(np.abs(part).max() / (6 * matrix), E4M3), 2.0**-9)) * matrix
            out[i : i + block, j] = nearest(part / step, E2M1) * step
    return out


def nf4(w: np.ndarray, block: int = 64, group: int = 256) -> np.ndarray:
    """A matrix through the normal quantiles, column by column in blocks of rows, scales quantised row by row."""
    n_blocks = -(-w.shape[0] // block)
    largest = np.array([np.abs(w[i * block : (i + 1) * block]).max(axis=0) for i in range(n_blocks)])
    flat = (largest - largest.mean()).reshape(-1)
    kept = np.zeros_like(flat)
    for i in range(0, len(flat), group):
        part = flat[i : i + group]
        scale = np.abs(part).max() / 448 if np.any(part) else 1.0
        kept[i : i + group] = nearest(part / scale, E4M3) * scale
    scales = (kept + largest.mean()).reshape(largest.shape).repeat(block, axis=0)[: len(w)]
    ratios = w / np.where(largest > 0, largest, 1).repeat(block, axis=0)[: len(w)]
    return NF4[np.abs(ratios[..., None] - NF4).argmin(axis=-1)] * scales


REFERENCES = {"fp8": fp8, "nvfp4": nvfp4, "nf4": nf4}

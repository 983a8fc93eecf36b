"""The machine that a plan is for: what it holds, how fast it is, and whether a run fits on it."""

import dataclasses
import os
import shutil
from pathlib import Path

from stackwise_jax.errors import UserError, did_you_mean
from stackwise_jax.memory import placement
from stackwise_jax.ops.target import HOPPER, Target, cuda_capability
from stackwise_jax.train.metrics import PEAK_FLOPS, peak_flops

# Memory in GB, and compute capability with float32 TFLOP/s over TB/s of memory, of cards by the names of
# `metrics.PEAK_FLOPS` (vendors' data sheets).
CARDS: dict[str, tuple[int, Target]] = {
    "H200": (141, Target((9, 0), 67.0 / 4.8)),
    "H100": (80, Target((9, 0), 67.0 / 3.35)),
    "A100": (80, Target((8, 0), 19.5 / 2.04)),
    "L4": (24, Target((8, 9), 30.3 / 0.3)),
    "4090": (24, Target((8, 9), 82.6 / 1.01)),
    "3090": (24, Target((8, 6), 35.6 / 0.94)),
    "V100": (32, Target((7, 0), 15.7 / 0.9)),
    "T4": (16, Target((7, 5), 8.1 / 0.32)),
}
MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT_FRACTION = 0.75  # of a card's memory, which JAX takes
ASSUMED_SHARE = 0.5  # of the peak FLOP/s, where nobody says better


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a plan may use; None: unknown.

    Attributes:
      name: of the card, or of the device at hand.
      device: bytes of one device that JAX will take.
      host, disk: bytes that are free.
      flops: FLOP/s that one device is expected to reach.
      speed: where `flops` is from, for people.
      target: the kind of card, for the programs that are planned for it.
    """

    name: str
    device: int | None
    host: int | None
    disk: int | None
    flops: float | None
    speed: str
    target: Target


def machine(
    folder: Path,
    *,
    card: str | None = None,
    device_gib: float | None = None,
    host_gib: float | None = None,
    disk_gib: float | None = None,
    share: float | None = None,
    peak: float | None = None,
) -> Machine:
    """The machine at hand, with what the arguments say otherwise.

    Args:
      folder: where a run would lie; it need not exist.
      card: a key of `CARDS`.
      device_gib, host_gib, disk_gib: of one card's memory, of host memory and disk that a run may take.
      share: of the peak FLOP/s that a run will reach.
      peak: FLOP/s of one device, `logging.peak_flops`.

    Raises:
      UserError: no such card.
    """
    if card is not None and card not in CARDS:
        raise UserError(f"--card={card} must be one of: {', '.join(CARDS)}.{did_you_mean(card, CARDS)}")
    memory = None if card is None else CARDS[card][0] * 10**9
    memory = memory if device_gib is None else int(device_gib * 2**30)
    if memory is not None:
        device = int(memory * float(os.environ.get(MEM_FRACTION, _DEFAULT_FRACTION)))
    else:
        device = placement.device_limit()
    top = peak if peak is not None else PEAK_FLOPS[card] if card is not None else peak_flops(None)
    own_share = ASSUMED_SHARE if share is None else share
    speed = (
        f"{own_share:g} of {(top or 0) / 1e12:.0f} TFLOP/s ({'assumed; say another' if share is None else 'as'} --mfu)"
    )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Machine(
        name=card or ("the card" if memory is not None else placement.device_name()),
        device=device,
        host=placement.host_room() if host_gib is None else int(host_gib * 2**30),
        disk=shutil.disk_usage(existing).free if disk_gib is None else int(disk_gib * 2**30),
        flops=None if top is None else own_share * top,
        speed=speed,
        target=target_at_hand() if card is None else CARDS[card][1],
    )


def target_at_hand() -> Target:
    """The kind of the device at hand; a Hopper GPU where that is no NVIDIA GPU."""
    capability = cuda_capability()
    if capability is None:
        return HOPPER
    kind = placement.device_name().lower()
    known = next((target for name, (_, target) in CARDS.items() if name.lower() in kind), HOPPER)
    return Target(capability, known.flops_per_byte)

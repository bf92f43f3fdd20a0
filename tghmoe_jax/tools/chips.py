"""What a TPU chip can do, for rooflines and MFU.

Peak bf16 FLOP/s, HBM bandwidth and half of the bidirectional interconnect bandwidth of a chip are those of
https://cloud.google.com/tpu/docs/v5e, v5p and v6e; the usable HBM is what libtpu's compiler states.
"""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak bf16 FLOP/s, usable HBM in bytes, HBM and one-way interconnect bandwidth in bytes/s; jax's device_kind."""

    device_kind: str
    peak: float
    hbm: float
    hbm_bandwidth: float
    ici_bandwidth: float


CHIPS = {
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9),
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 400e9),
}


def chip_of(device) -> Chip | None:
    """The chip of a jax device, or None where its peak is not known."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device.device_kind), None)

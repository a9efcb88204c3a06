"""What accelerators can do, with the place where that is written."""

from __future__ import annotations

import dataclasses

TPU = 'docs.cloud.google.com/tpu/docs'
# Dense bfloat16 FLOP/s of one JAX device, and where that is written. A TPU7x chip is two devices.
PEAKS: dict[str, tuple[float, str]] = {
    'TPU v4': (275e12, f'{TPU}/v4'),
    'TPU v5 lite': (197e12, f'{TPU}/v5e'),
    'TPU v5e': (197e12, f'{TPU}/v5e'),
    'TPU v5': (459e12, f'{TPU}/v5p'),
    'TPU v5p': (459e12, f'{TPU}/v5p'),
    'TPU v6 lite': (918e12, f'{TPU}/v6e'),
    'TPU v6e': (918e12, f'{TPU}/v6e'),
    'TPU7x': (2307e12 / 2, f'{TPU}/tpu7x'),
    'NVIDIA A100': (312e12, 'NVIDIA A100 data sheet'),
    'NVIDIA L4': (121e12, 'NVIDIA L4 data sheet'),
    'NVIDIA H100 80GB HBM3': (989e12, 'NVIDIA H100 data sheet, SXM'),
    'NVIDIA H100 PCIe': (756e12, 'NVIDIA H100 data sheet, PCIe'),
    'NVIDIA H200 NVL': (835e12, 'NVIDIA H200 data sheet, NVL'),
    'NVIDIA H200': (989e12, 'NVIDIA H200 data sheet, SXM'),
    'NVIDIA B200': (2250e12, 'NVIDIA HGX B200 data sheet'),
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one JAX device of a TPU slice (a TPU7x chip is two).

    Attributes:
        flops: dense bfloat16, a second; memory: bytes of HBM; bandwidth: of HBM, bytes a second.
        links: bytes a second that it can send over all its links to other chips together.
        source: where all of this is written.
    """

    flops: float
    memory: float
    bandwidth: float
    links: float
    source: str


# HBM, its bandwidth, links. The pages give links in both directions together, that of v5e in one direction and in bits.
_SLICES: dict[str, tuple[float, float, float, str]] = {
    'TPU v5': (95 * 2**30, 2765e9, 1200e9 / 2, f'{TPU}/tpu7x'),
    'TPU v5 lite': (16 * 2**30, 819e9, 1600e9 / 8, f'{TPU}/v5e'),
    'TPU v6 lite': (32 * 2**30, 1638e9, 800e9 / 2, f'{TPU}/tpu7x'),
    'TPU7x': (192 * 2**30 / 2, 7380e9 / 2, 1200e9 / 2 / 2, f'{TPU}/tpu7x'),
}


def chip_of(kind: str) -> Chip | None:
    """The chip of that device kind, or None."""
    return Chip(PEAKS[kind][0], *_SLICES[kind]) if kind in _SLICES else None


def known_peak(kind: str) -> tuple[float, str] | None:
    """The entry of PEAKS for a device kind. Names of GPUs may go on with the size or the form of the card."""
    for name, entry in PEAKS.items():
        if kind == name or (name.startswith('NVIDIA') and kind.startswith((f'{name} ', f'{name}-'))):
            return entry
    return None


def si(value: float) -> str:
    """Three digits and the prefix of a unit, for large numbers."""
    for factor, prefix in ((1e15, 'P'), (1e12, 'T'), (1e9, 'G')):
        if value >= factor:
            return f'{value / factor:.3g} {prefix}'
    return f'{value / 1e6:.3g} M'

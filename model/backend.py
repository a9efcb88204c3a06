"""Where a program is compiled for: the hot operations have an implementation for each backend."""

from __future__ import annotations

import jax


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh in use, which need not be this machine's, else of JAX's first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None and device.platform else jax.default_backend()

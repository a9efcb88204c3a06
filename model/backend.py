"""What a program is compiled for, and what its text cannot tell of how often its loops run."""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax

TRIPS = 'trips_'  # followed by a number, in the name of a scope


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the code being traced will run on, which decides between kernels.

    That of the mesh in use, which may be of devices that are not here (see `train.compile`); JAX's default without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def trips(count: int) -> AbstractContextManager[None]:
    """Notes, in the compiled program, how often loops made in this context run when work is spread evenly.

    For loops whose trip count depends on data, such as the rounds of expert parallelism: `train.compile` counts their
    FLOPs and bytes that many times, and once where nothing is noted. Known trip counts win over it.

    Args:
        count: 0 or more.
    """
    return jax.named_scope(f'{TRIPS}{int(count)}')

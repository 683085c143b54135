"""The environment of processes that tests start."""

import os


def with_devices(num_devices):
    """Return an environment in which jax has so many CPU devices, and which compiles as it does here."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}

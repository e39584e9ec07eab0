"""A Ray of a command's own, for a laptop or a machine with GPUs: on loopback, and gone when the command ends."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Read when Ray is imported. The last one, despite its name, makes Ray keep 127.0.0.1 instead of the outward address.
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@contextmanager
def own_cluster(address: str | None, verbose: bool = False) -> Iterator[None]:
    """The cluster at `address`, or RAY_ADDRESS, or else a Ray that lives as long as this context.

    An address is only noted: `cluster.connect` joins it, and tells what is wrong with it.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    import logging

    import ray

    temp_dir = tempfile.mkdtemp(prefix="rcd-", dir="/tmp")  # short: the path of a Unix socket inside has 103 characters
    try:
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + 1,  # the models take the real ones, what hands out the work takes little
            include_dashboard=False,
            logging_level=logging.INFO if verbose else logging.ERROR,
            log_to_driver=verbose,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)

"""Connects this process to Ray: to a running cluster, or to one that ends with the command."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.ray_cluster import hub_token, worker_start
from pipelines.ray_cluster.local import STATE, Head
from rcd_core.errors import UserError

# Read when Ray is imported. The last one, despite its name, makes Ray keep 127.0.0.1 instead of the outward address,
# at which a head on loopback does not answer.
_ON_LOOPBACK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


CONNECT_S = 10.0


def connect(verbose: bool = False) -> None:
    """Join the cluster at RAY_ADDRESS, or else the head that `rcd up` started, or else the one that Ray finds on this
    machine. Does nothing when already joined.

    verbose: show Ray Data's progress bars and the output of workers. Raises UserError when there is no cluster.
    """
    # Read when ray.data is imported, here and in the workers.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "INFO" if verbose else "ERROR")
    address = os.environ.get("RAY_ADDRESS")
    if not address and (address := _local_head()):
        _set_defaults(_ON_LOOPBACK)
    import ray

    if ray.is_initialized():
        return
    worker_start.collect_rarely()  # the stages import as much here
    _require_answer(address or "")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(
            address=address or "auto",
            logging_level=_log_level(verbose),
            log_to_driver=verbose,
            runtime_env=worker_start.runtime_env(),
        )
        hub_token.give()
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"at {address}" if address else "on this machine"
        raise UserError(
            f"cannot reach a Ray cluster {where} ({str(error).splitlines()[0]}); start one with `rcd up` on a laptop "
            "or `ray start --head` elsewhere, or submit this job to a cluster with `ray job submit`"
        ) from error
    finally:
        for number, handler in handlers.items():  # ray.init replaces them with its own
            signal.signal(number, handler or signal.SIG_DFL)


def _local_head() -> str | None:
    """The address of the head that `rcd up` started, if it runs."""
    head = Head.load(STATE)
    return head.gcs if head is not None and head.answers() else None


def _set_defaults(values: dict[str, str]) -> None:
    os.environ.update({name: value for name, value in values.items() if name not in os.environ})


def _require_answer(address: str) -> None:
    """Raise UserError if nothing listens at host:port, with or without a scheme. Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local", or nothing
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise UserError(
            f"nothing answers at RAY_ADDRESS={address} ({error.strerror or error}); correct it, unset it to use the "
            "head on this machine (`rcd up` starts one), or submit this job to a cluster with `ray job submit`"
        ) from error


@contextmanager
def temporary_cluster(address: str | None, verbose: bool = False) -> Iterator[None]:
    """Use the cluster at `address` or RAY_ADDRESS; without either, start one on loopback that ends with this context.

    An address is only stored in RAY_ADDRESS. `connect` uses it, and raises when there is no cluster.
    """
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    _set_defaults(_ON_LOOPBACK | {"RAY_DATA_DISABLE_PROGRESS_BARS": "1"})
    import ray

    temp_dir = tempfile.mkdtemp(prefix="rcd-", dir="/tmp")  # a Unix socket's path has at most 103 characters
    try:
        ray.init(
            address="local",
            num_cpus=(os.cpu_count() or 1) + 1,  # models occupy the real cores; the scheduling actor needs little
            include_dashboard=False,
            logging_level=_log_level(verbose),
            log_to_driver=verbose,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


def _log_level(verbose: bool) -> int:
    return logging.INFO if verbose else logging.ERROR

"""Join a Ray cluster, or start one in this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

from harness.cluster.job import LOOPBACK
from harness.cluster.nodes import Cluster, inspect_cluster

CONNECT_SECONDS = 20.0
LONGEST_TEMP_DIR = 36  # a socket may have a name of 107 bytes, of which Ray adds up to 71
LOST = "harness: Ray or this command was killed; the same command (tune: with --resume) goes on from the last checkpoints"
AUTH_MODE = "RAY_AUTH_MODE"
_at_end = contextlib.ExitStack()  # what `disconnect` does after Ray's own

OF_WORKERS = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # NVML's; CUDA's own is by speed
    "RAY_worker_niceness": "0",  # 15 by default: any other process of the machine would slow the training down
    # a pruned trial may take this long to free its memory; after 2 s, the default, the next trial is lost
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",
}
_ENVIRONMENT = {
    **OF_WORKERS, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_DEDUP_LOGS": "1", "RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # in Ray Train's controller, as Ray's own
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how soon an end is seen: 2 s by default
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that calls Ray after the end would start it again
    "RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # with verbose=0: Tune prints nothing
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "3600", "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the caller's: there is no state to save
}  # fmt: skip


class _RayProcess(subprocess.Popen[bytes]):
    """A process of Ray's in this machine. It and its children are spared a SIGTERM to the command's process group or to all
    processes of a job (by `timeout`, a scheduler), so that the runs can stop first."""

    made: ClassVar[list[Any]] = []

    def __init__(self, *args: Any, **options: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            super().__init__(*args, process_group=0, **options)
            self.made.append(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def terminate(self) -> None:
        """By Ray, at the end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class ClusterError(RuntimeError):
    """The cluster cannot be reached, has too little, or was lost; the message is one line for the user."""


def connect(address: str | None, *, cpus: int, gpus: int, verbose: bool = False) -> Cluster:
    """Join the Ray cluster at `address`, or start one in this machine with so many CPUs and GPUs.

    Raises ClusterError where no cluster answers within 30 seconds: 10 for TCP, 20 for Ray.
    """
    os.environ.update(_ENVIRONMENT | os.environ)
    mode = os.environ.get(AUTH_MODE)
    if address is not None:
        _check_alive(address)
    import ray
    import ray._private.services as services
    import ray._private.worker as driver

    def show(data: Any, ignore_prefix: bool) -> None:
        for batch in driver.stderr_deduplicator.deduplicate(data) if verbose else ():
            driver.print_worker_logs(batch, sys.stderr, ignore_prefix)

    driver.print_to_stdstream = show  # Ray's would print to standard output, which may be a program's
    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": "INFO" if verbose else "ERROR"}
    with contextlib.ExitStack() as stack:
        if address is None:
            # it listens on 127.0.0.1: Ray would replace that with the machine's own address, and then listen on all
            ours: dict[str, Any] = {"resolve_ip_for_localhost": lambda host: host}
            if sys.platform == "linux":  # elsewhere Ray ends its processes by this process group
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
                ours["ConsolePopen"] = _RayProcess
            for name, value in ours.items():
                stack.callback(setattr, services, name, getattr(services, name))
                setattr(services, name, value)
            options |= {
                "num_cpus": cpus, "num_gpus": gpus, "include_dashboard": False, "address": "local",
                "object_store_memory": 256 * 2**20,  # nothing large travels through Ray
                "_node_ip_address": LOOPBACK,
            }  # fmt: skip
            if len(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) > LONGEST_TEMP_DIR:
                options["_temp_dir"] = "/tmp/ray"
        else:  # its nodes have their own environment
            options |= {"address": address, "runtime_env": {"env_vars": OF_WORKERS}}
        # Ray's own would end this process with 15 and no word; None is a handler that Python did not set
        before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        if threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGTERM, before)
        try:
            ray.init(**options)
        except Exception as error:  # of many kinds; too busy a machine gives a bare one
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            what = "Ray does not start here" if address is None else f"no Ray cluster answers at {address!r}"
            raise ClusterError(f"{what}: {first}") from None
        except BaseException:  # Ctrl-C: Ray would leave what it has started
            for process in _RayProcess.made:
                process.terminate()
            if mode is None:
                _forget_auth_mode()
            raise
    with contextlib.suppress(OSError):  # Ray lets everybody on this machine read it
        (Path.home() / ".ray" / "auth_token").chmod(0o600)
    if mode is None:
        _at_end.callback(_forget_auth_mode)
    _watch()
    return inspect_cluster()


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends with this, and every process in it."""
    import ray

    ray.shutdown()
    _RayProcess.made.clear()
    _at_end.close()


def _forget_auth_mode() -> None:
    """With a cluster of its own Ray sets token mode for the whole process; a cluster without tokens would lose its actors."""
    import ray._raylet as private

    raylet: Any = private
    os.environ.pop(AUTH_MODE, None)
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _watch() -> None:
    """Say a last word if this process ends without `disconnect`: Ray ends it where its own processes on this node or
    the head are gone, and runs no code of ours."""
    command = ["sh", "-c", 'trap "" TERM; read -r ended || echo "$0" >&2', LOST]
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _at_end.callback(watcher.communicate, b"ended\n")


def _check_alive(address: str) -> None:
    """Fail early and clearly: ray.init would retry for minutes and then end the process."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    none = f"no Ray cluster answers at {address!r}"
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit():
                raise ClusterError(f"--address {address!r} is not HOST:PORT or auto")
            socket.create_connection((host, int(port)), timeout=10).close()
            command += ["--address", address]
        if subprocess.run(command, capture_output=True, timeout=CONNECT_SECONDS, check=False).returncode:
            raise ClusterError(f"{none}: `ray health-check` found none")
    except OSError as error:
        raise ClusterError(f"{none}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{none} within {CONNECT_SECONDS:.0f} seconds") from None

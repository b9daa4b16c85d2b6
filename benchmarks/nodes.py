"""Nodes with networks, disks and clocks of their own, in this machine: network namespaces on a bridge, a real `ray start` in
each. Needs root, iproute2 and gcc.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rounds import ROOT

NETWORK, PORT = "10.77.0", 6390
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "eth0",  # workers inherit the node's environment, not the driver's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_enable_worker_prestart": "0",
    # a silent node is given up after 12 s: longer than most cuts, shorter than 40 s, the default
    "RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "3000", "RAY_health_check_failure_threshold": "4",
}  # fmt: skip
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static volatile long *offset;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void init(void) {
    const char *path = getenv("CLOCK_OFFSET");
    int file = path ? open(path, O_RDONLY) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (page != MAP_FAILED) offset = page;
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
}
int clock_gettime(clockid_t id, struct timespec *now) {
    if (!real) init();
    int failed = real(id, now);
    if (!failed && id == CLOCK_REALTIME && offset) now->tv_sec += *offset;
    return failed;
}
time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *where, void *zone) {
    struct timespec now;
    int failed = clock_gettime(CLOCK_REALTIME, &now);
    where->tv_sec = now.tv_sec, where->tv_usec = now.tv_nsec / 1000;
    return failed;
}
"""
"""A library whose processes read a clock that is ahead of the machine's by the seconds in the file $CLOCK_OFFSET."""


def ip(*words: object) -> None:
    """iproute2, which must succeed."""
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


class Nodes:
    """`count` nodes of one CPU each: a, the head, then b and c. Their logs are in `folder`."""

    def __init__(self, count: int, folder: Path) -> None:
        self.names, self.folder = "abc"[:count], folder
        self.session = Path(tempfile.mkdtemp(prefix="hn", dir="/tmp"))  # short: Ray's sockets lie below it
        self.environment = os.environ | ENVIRONMENT | {
            "RAY_AUTH_TOKEN": secrets.token_hex(32), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "LD_PRELOAD": str(self.session / "clock.so"),
        }  # fmt: skip
        compiler = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(self.session / "clock.so"), "-ldl"]
        subprocess.run(compiler, input=CLOCK, text=True, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.remove_networks()
        ip("link", "add", "harness-br", "type", "bridge")
        ip("link", "set", "harness-br", "up")
        for name in self.names:
            ip("netns", "add", f"harness-{name}")
            ip(*f"link add harness-v{name} type veth peer name eth0 netns harness-{name}".split())
            ip("-n", f"harness-{name}", "link", "set", "lo", "up")
            ip("-n", f"harness-{name}", "address", "add", f"{self.address(name)}/24", "dev", "eth0")
            ip("-n", f"harness-{name}", "link", "set", "eth0", "up")
        self.repair()

    def address(self, name: str) -> str:
        """Of a node."""
        return f"{NETWORK}.{'abc'.index(name) + 1}"

    @property
    def head(self) -> str:
        """The cluster's address."""
        return f"{self.address('a')}:{PORT}"

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """A command as it is run on a node."""
        return ["ip", "netns", "exec", f"harness-{name}", "env", f"CLOCK_OFFSET={self.clock(name)}", *command]

    def clock(self, name: str) -> Path:
        """The file that holds by how much a node's clock is ahead."""
        path = self.session / f"clock-{name}"
        if not path.exists():
            path.write_bytes(bytes(8))
        return path

    def set_clock(self, name: str, ahead: int) -> None:
        """Step a node's clock, under all processes that read it."""
        with self.clock(name).open("r+b") as file:
            file.write(ahead.to_bytes(8, sys.byteorder, signed=True))

    def pids(self, title: str = "", names: str = "") -> list[int]:
        """The processes of nodes whose command line holds `title`."""
        found = []
        for name in names or self.names:
            words = ["ip", "netns", "pids", f"harness-{name}"]
            for pid in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split():
                with suppress(OSError):
                    if title in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                        found.append(int(pid))
        return found

    def kill(self, name: str) -> None:
        """Every process of a node, at once, as when its power fails. Returns when they are gone, and their ports free."""
        while pids := self.pids(names=name):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def repair(self) -> None:
        """Everything as at first: links up and fast, clocks right, all nodes there."""
        for name in self.names:
            ip("link", "set", f"harness-v{name}", "master", "harness-br", "up")
            self.slow(name, on=False)
            self.set_clock(name, 0)
        self.restart()

    def restart(self) -> None:
        """Start again the nodes that have ended, as one does that was given up, once it learns of it. Without its head a
        cluster begins anew."""
        if not all(self.pids(title, "a") for title in ("gcs_server", "raylet/raylet")):
            for name in self.names:
                self.kill(name)
        for name in self.names:
            if not self.pids("raylet/raylet", name):
                self.kill(name)
                self.start(name)

    def start(self, name: str) -> None:
        """`ray start` on a node."""
        head = [
            f"--head --port={PORT} --include-dashboard=false --temp-dir={self.session}",
            f"--address={self.head}",
        ]
        words = f"ray start --node-ip-address={self.address(name)} --num-cpus=1 --object-store-memory=100000000"
        command = self.inside(name, f"{words} {head[name != 'a']}".split())
        with (self.folder / f"node-{name}.log").open("a") as log:
            subprocess.run(command, env=self.environment, stdout=log, stderr=log, check=True, timeout=120)

    def cut(self, name: str) -> None:
        """A node's link is down until `repair`."""
        ip("link", "set", f"harness-v{name}", "down")

    def silence(self, name: str) -> None:
        """What a node sends and is sent is lost, without a word, until `repair`."""
        ip("link", "set", f"harness-v{name}", "nomaster")

    def slow(self, name: str, *, on: bool) -> None:
        """What a node is sent waits up to 0.1 s and is lost beyond, or no longer. netem would do more; few kernels have it."""
        limit = ["tbf", "rate", "4mbit", "burst", "16kb", "latency", "100ms"] if on else []
        words = ["tc", "qdisc", "replace" if on else "del", "dev", f"harness-v{name}", "root", *limit]
        subprocess.run(words, capture_output=True, check=on)

    def drain(self, name: str, seconds: int) -> None:
        """Tell Ray that a node will be taken in so many seconds, as a cloud does of a spot instance."""
        program = f"""
import ray, subprocess
ray.init({self.head!r}, logging_level="ERROR")
(node,) = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == {self.address(name)!r}]
subprocess.run(["ray", "drain-node", "--address", {self.head!r}, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "spot", "--deadline-remaining-seconds", "{seconds}"], check=True)
"""
        command = self.inside("a", [sys.executable, "-c", program])
        subprocess.run(command, env=self.environment, capture_output=True, check=True, timeout=60)

    def check_closed(self) -> None:
        """Raise unless a process with another token is turned away: Ray's servers listen on every address of a node."""
        program = [sys.executable, "-c", f"import ray; ray.init({self.head!r}, logging_level='ERROR')"]
        stranger = self.environment | {"RAY_AUTH_TOKEN": "0" * 64}
        if not subprocess.run(self.inside("a", program), env=stranger, capture_output=True, timeout=60).returncode:
            raise SystemExit("a process with another token was let in")

    def remove_networks(self) -> None:
        """Also those of a script that was killed."""
        for name in "abc":  # a link goes some time after its namespace
            subprocess.run(["ip", "link", "delete", f"harness-v{name}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", f"harness-{name}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", "harness-br"], capture_output=True, check=False)

    def close(self) -> None:
        """End all processes of the nodes."""
        for name in self.names:
            self.kill(name)
        self.remove_networks()
        shutil.rmtree(self.session, ignore_errors=True)

"""The engine of a cluster: Ray schedules, places, retries and scales; this file only hands it tasks."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Self

from sdeflow.engine.base import Engine, EngineError, Item, Outcome, checked_workers


class Ray(Engine):
    """Work as tasks of Ray. The work itself (with its model) is put once into the object store and fetched once by each
    worker process; items and outcomes are all that travels afterwards.

    Ray that was started before (`ray.init`) is used as it is and left running. Without it, `address` is joined, or a
    Ray of this machine is started on the loopback interface, without a dashboard, and stopped at the end of the work,
    or of `with engine:` around several pieces of it.

    Args:
        address: of a running cluster; "auto" for the one this machine belongs to; None for this machine alone.
        workers: processes when one is started here: one a core unless given. Not with an address.
        cpus, gpus: what a task asks of Ray. With gpus, Ray tells each task its device (as "cuda").
        retries: how often Ray computes a task again whose worker died.
        runtime_env: for Ray's workers, as in `ray.init`: for instance {"pip": ["sdeflow"]}.

    Raises:
        ImportError: Ray, or for an address ray:// its client, is not installed.
        ValueError: numbers that mean nothing, workers with an address, or on entering a machine that has less than a
            task asks for.
        ConnectionError: nothing answers at the address.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        retries: int = 20,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        if address is not None and workers is not None:
            raise ValueError("a running cluster has the workers it has: give an address or workers, not both")
        if cpus < 0 or gpus < 0 or not cpus + gpus > 0:
            raise ValueError(f"expected cpus and gpus >= 0, one of them above, got {cpus!r} and {gpus!r}")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"expected retries >= 0, got {retries!r}")
        self.address, self.cpus, self.gpus, self.retries = address, cpus, gpus, retries
        self.runtime_env = runtime_env
        self._users, self._ours = 0, False
        self._started = None if workers is None else checked_workers(workers)
        if address is not None and address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
            raise ImportError(f'the address {address} needs Ray\'s client: pip install "ray[client]"')
        if address is None:  # read when Ray is imported: without it Ray of one machine listens to the network too
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        _ray()

    def __repr__(self) -> str:
        return f"Ray({self.address!r}, cpus={self.cpus}, gpus={self.gpus})"

    @property
    def workers(self) -> int:
        """Of the cluster as it is now, or of the one that would be started."""
        ray = _ray()
        if not ray.is_initialized():
            return self._started or os.cpu_count() or 1
        have = ray.cluster_resources()
        fits = [have.get(name, 0.0) / need for name, need in (("CPU", self.cpus), ("GPU", self.gpus)) if need > 0]
        return max(1, int(min(fits)))

    def map(
        self, work: Callable[[Item], Outcome], items: Iterable[Item], *, memory: int = 0
    ) -> Iterator[tuple[Item, Outcome]]:
        ray = _ray()
        died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
        with self:
            try:
                yield from self._tasks(ray, work, iter(items), memory)
            except died as error:
                raise EngineError(f"a worker of Ray died over {self.retries} times at one item: {error}") from error

    def __enter__(self) -> Self:
        if self._users == 0 and not _ray().is_initialized():
            with _own_signals():
                self._start(_ray())
            self._ours = True
        self._users += 1
        return self

    def __exit__(self, *error: object) -> None:
        self._users -= 1
        if self._users == 0 and self._ours:
            self._ours = False
            _ray().shutdown()

    def _start(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would call home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without a GPU keeps its variables
        if self.address is not None:
            _refuse_silent(self.address)
            ray.init(address=self.address, log_to_driver=False, runtime_env=self.runtime_env)
            return
        env = dict(self.runtime_env or {})
        # workers find the modules that this process finds: its script's folder, and what it added
        paths = [path or os.getcwd() for path in sys.path]
        env["env_vars"] = {"PYTHONPATH": os.pathsep.join(paths), **env.get("env_vars", {})}
        ray.init(
            num_cpus=self._started, include_dashboard=False, log_to_driver=False, runtime_env=env,
            _node_ip_address="127.0.0.1",
        )  # fmt: skip
        try:
            self._refuse_more_than_there_is(ray)
        except ValueError:
            ray.shutdown()
            raise

    def _refuse_more_than_there_is(self, ray: Any) -> None:
        """Nothing will be added to this machine: a task that asks for more would wait for ever."""
        have = ray.cluster_resources()
        for name, need in (("CPU", self.cpus), ("GPU", self.gpus)):
            if have.get(name, 0.0) < need:
                raise ValueError(
                    f"a task asks for {need:g} {name} and Ray on this machine has {have.get(name, 0.0):g}: give fewer, "
                    "or the address of a cluster"
                )

    def _tasks(
        self, ray: Any, work: Callable[[Item], Outcome], items: Iterator[Item], memory: int
    ) -> Iterator[tuple[Item, Outcome]]:
        held = ray.put(work)
        task = ray.remote(_compute).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, **({"memory": memory} if memory else {})
        )
        running: dict[Any, Item] = {}
        while True:
            # twice what runs: a worker never waits for us, and what waits is what Ray's autoscaler sees
            for item in islice(items, max(0, 2 * self.workers + 1 - len(running))):
                running[task.remote([held], item)] = item  # in a list: fetched by the worker, not before each task
            if not running:
                return
            # all that are ready, as to ask costs in proportion to how many are asked about
            ray.wait(list(running), num_returns=1)
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for one in done:
                try:
                    outcome = ray.get(one)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                yield running.pop(one), outcome


_PATIENCE = 5.0
"""Seconds that an address may take to answer; Ray itself tries for over a minute."""


def _refuse_silent(address: str) -> None:
    """Refuse an address host:port at which nothing answers; other kinds are Ray's to judge."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"no Ray answers at {address}: {error}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself: give it back, so that whoever runs this is told as without Ray."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_held: dict[str, Callable[[Any], Any]] = {}
"""In a worker: the last work that it computed, by the reference it came under."""


def _compute(held: list[Any], item: Any) -> Any:
    import ray
    import torch

    key = held[0].hex()
    if key not in _held:
        torch.set_num_threads(1)
        _held.clear()
        _held[key] = ray.get(held[0])
    return _held[key](item)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError('the engine "ray" needs Ray: pip install "sdeflow[ray]"') from error
    return ray

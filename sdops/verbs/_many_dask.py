"""The engine of many builds: dask.distributed, as processes of this machine or as a cluster that somebody started.

A scheduler executes what whoever reaches its port sends: our own listens on this machine alone.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdops import __version__
from sdops.core.run import default_jobs
from sdops.errors import SdopsError, UsageError
from sdops.verbs._many_jobs import Failed, guarded

if TYPE_CHECKING:
    from sdops.verbs._many import Result, Task

_PATIENCE = 20  # seconds until a scheduler and its first worker must have answered


def _library(name: str) -> Any:
    return import_module(name)


@contextmanager
def connected(workers: int, cluster: str | None) -> Iterator[Any]:
    """A client of the cluster at an address, or of as many new processes.

    Raises:
        SdopsError: nobody answers there, or workers have another version of sdops.
    """
    dask, distributed = _library("dask"), _library("distributed")
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if cluster is not None:
        with _client(distributed.Client, cluster) as client:
            _check_workers(client, cluster)
            yield client
        return
    threads = {"OMP_NUM_THREADS": str(max(1, default_jobs() // workers))}
    with tempfile.TemporaryDirectory(prefix="sdops-workers-") as folder:
        own: dict[str, Any] = {"temporary-directory": folder, "distributed.worker.memory.terminate": False}
        own["distributed.worker.preload"] = [__name__]
        with dask.config.set(
            own | {"distributed.worker.memory.pause": False, "distributed.worker.memory.spill": False}
        ):
            local = distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                silence_logs=logging.CRITICAL,
                env={**os.environ, **threads},
            )
            with local, distributed.Client(local) as client:
                yield client


def dask_setup(worker: Any) -> None:
    """Let Ctrl-C, which reaches all processes of a terminal, be answered by the one that ends the others."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _client(make: Any, address: str) -> Iterator[Any]:
    try:
        client = make(address, timeout=_PATIENCE)
    except (OSError, ValueError, TimeoutError) as error:
        raise SdopsError(
            f"no scheduler answers at `{address}`: {str(error).splitlines()[0][:200] if str(error) else 'no answer'}",
            hint="`dask scheduler` starts one, `dask worker ADDRESS --nthreads 1` a worker on each machine",
            cluster=address,
        ) from None
    with client:
        yield client


def _check_workers(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_PATIENCE)
    except TimeoutError:
        raise SdopsError(
            f"the scheduler at `{address}` has no workers",
            hint=f"`dask worker {address} --nthreads 1` starts one, on every machine",
            cluster=address,
        ) from None
    try:
        versions = client.run(_version)
    except Exception as error:  # noqa: BLE001 -- whatever a worker without sdops raises
        raise SdopsError(
            f"a worker of `{address}` cannot import sdops ({type(error).__name__})",
            hint=f"install sdops {__version__} where the workers are",
        ) from None
    others = {worker: version for worker, version in versions.items() if version != __version__}
    if others:
        worker, version = next(iter(others.items()))
        raise UsageError(
            f"the worker `{worker}` has sdops {version}, this is {__version__}",
            hint=f"`pip install sdops=={__version__}` there",
        )


def _version() -> str:
    return __version__


def threads(client: Any) -> int:
    """How many threads a job may have, if all workers of a machine are busy."""
    hosts = Counter(str(worker["host"]) for worker in client.scheduler_info(n_workers=-1)["workers"].values())
    return max(1, default_jobs() // max(hosts.values(), default=1))


def run(client: Any, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    """Do all tasks, each after those that it needs; gives results as they come.

    A task whose worker is killed is given to another, some times.
    """
    futures: dict[str, Any] = {}
    names: dict[str, Task] = {}
    for task in tasks:
        needs = [futures[name] for name in task.after]
        key = f"sdops-{task.name}-{id(tasks)}"
        futures[task.name] = client.submit(_job, task.kind, task.arguments, needs, key=key, pure=False)
        names[key] = task
    for future in _library("distributed").as_completed(list(futures.values())):
        task = names[future.key]
        if future.status == "finished":
            yield task, future.result()
        else:
            yield task, _died(future.exception())


def _job(kind: str, arguments: Sequence[Any], needs: Sequence[Any]) -> Result:
    del needs  # they are done, that is all
    return guarded(kind, *arguments)


def _died(error: BaseException | None) -> Failed:
    name = type(error).__name__
    if name == "KilledWorker":
        return Failed(
            "the workers that did it were killed, one after the other", "perhaps memory is short: `--workers 1`"
        )
    if name == "FutureCancelledError" or error is None:
        return Failed("the scheduler went away", "run the command again: what is finished stays")
    return Failed(f"unexpected {name}: {error}", "this is a bug; `--workers 1` shows where", "SdopsError")

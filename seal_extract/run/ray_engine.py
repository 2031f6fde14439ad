"""A cohort over all GPUs of a Ray cluster: one actor per GPU, or per share of the cores; a task per slide.

Scheduling, restarts and retries are Ray's. A slide whose worker died is given to a restarted one, which finds
nothing of it, since features get their names only when they are whole.
"""

from __future__ import annotations

import re
import socket
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import SlideOpenError, UsageError, how_to_install
from seal_extract.run.channel import Channel, Stopped
from seal_extract.run.job import SlideJob
from seal_extract.run.options import ExtractOptions
from seal_extract.run.status_table import Progress, SlideResult

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

SLIDES_IN_HAND = 4  # of each worker: one at the encoder, the next opened and planned
CORES_PER_WORKER = 4  # where there is no GPU
RETRIES = 3  # of a slide whose worker died
SAY_S = 30.0  # without a slide done, until the workers are said that have no room
KNOCK_S = 10.0  # for a head node to answer


@dataclass(frozen=True)
class RayEngine:
    """Runs a cohort on Ray.

    Attributes:
        address: of a cluster, ``"auto"`` for the one around; None starts one on this machine.
        workers: how many; one per GPU, or per `CORES_PER_WORKER` cores, by default.
        cores: of each worker; an equal share by default.
    """

    address: str | None = None
    workers: int | None = None
    cores: int | None = None

    def run(
        self,
        jobs: Sequence[SlideJob],
        encoders: Sequence[EncoderRequest | Encoder],
        out: Path,
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        """See `Engine.run`; progress is told slide by slide.

        Raises:
            UsageError: Ray is not installed, not reachable, or too small; or an encoder is no request.
        """
        requests = [e for e in encoders if isinstance(e, EncoderRequest)]
        if len(requests) < len(encoders):
            raise UsageError("workers load encoders by themselves; give their names, not loaded encoders")
        ray = _ray()
        started = not ray.is_initialized()
        _connect(ray, self.address)
        try:
            yield from self._run(ray, jobs, requests, out.resolve(), options, progress)
        finally:
            if started:
                ray.shutdown()

    def _run(
        self,
        ray: Any,
        jobs: Sequence[SlideJob],
        requests: list[EncoderRequest],
        out: Path,
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        workers, cores, gpus = shares(ray.nodes(), self.workers, self.cores)
        workers = min(workers, len(jobs))
        actor = ray.remote(_Worker).options(
            num_cpus=cores,
            num_gpus=gpus,
            max_concurrency=SLIDES_IN_HAND,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        shared = replace(
            options, stage_gb=options.stage_gb / _most_on_a_node(ray.nodes(), workers, cores, gpus)
        )
        theirs = replace(shared.resolved(), workers=options.workers or cores)
        actors = [actor.remote(requests, out, theirs) for _ in range(workers)]
        waiting = [job.resolved() for job in reversed(jobs)]
        original = {job.entry.name: job.entry for job in jobs}
        placed = [one.is_there.remote() for one in actors]
        running: dict[Any, tuple[Any, SlideJob]] = {}
        said = False

        def give(actor: Any) -> None:
            job = waiting.pop()
            running[actor.embed.remote(job)] = actor, job

        for i in range(min(len(waiting), SLIDES_IN_HAND * workers)):
            give(actors[i % workers])
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=None if said else SAY_S)
            if not ready:
                said = _say_who_is_missing(ray, placed, cores, gpus)
                continue
            free, job = running.pop(ready[0])
            if waiting:
                give(free)
            try:
                result: SlideResult = ray.get(ready[0])
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as exc:
                died = SlideOpenError(
                    f"{job.entry.source}: its worker died {RETRIES + 1} times ({_first_line(exc)}); "
                    "run it by itself without --engine ray"
                )
                result = SlideResult(job.entry, (), died, 0.0)
            if progress is not None and result.features:
                patches = len(result.features[0].grid)
                progress(original[result.name].path, patches, patches)
            yield replace(result, entry=original[result.name])
        for one in actors:
            ray.kill(one)


def shares(
    nodes: list[dict[str, Any]], workers: int | None = None, cores: int | None = None
) -> tuple[int, int, int]:
    """Workers, and the cores and GPUs of each, so that every worker fits on one node.

    Where any node has a GPU each worker takes one, and nodes without stay idle.

    Args:
        nodes: as `ray.nodes` gives them.
        workers: how many; one per GPU, or per `CORES_PER_WORKER` cores, by default.
        cores: of each; the most with which all of them have room, by default.

    Raises:
        UsageError: there is no room for them.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    have = [(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in there]
    gpus, most = sum(gpu for _, gpu in have), max((cpu for cpu, _ in have), default=0)

    def room(each: int) -> int:
        return sum(min(cpu // each, gpu) if gpus else cpu // each for cpu, gpu in have)

    if cores is None and (wanted := workers or gpus):
        cores = next((each for each in range(most, 0, -1) if room(each) >= wanted), 1)
    elif cores is None:
        cores = max(1, most // max(1, most // CORES_PER_WORKER))
    workers = workers or room(cores)
    if not workers or workers > room(cores):
        named = ", ".join(f"{cpu} cores and {gpu} GPUs" for cpu, gpu in have) or "nothing"
        raise UsageError(
            f"the nodes of Ray ({named}) have no room for {workers or 1} workers of {cores} cores"
            f"{' and a GPU' if gpus else ''}; leave out --ray-workers and --ray-cores, or start more nodes"
        )
    return workers, cores, min(gpus, 1)


class _Worker:
    """One stream over the slides that it is given; each call waits for its own."""

    def __init__(self, requests: list[EncoderRequest], out: Path, options: ExtractOptions) -> None:
        self._requests, self._out, self._options = requests, out, options
        self._jobs: Channel[SlideJob] = Channel()
        self._results: dict[str, Future[SlideResult]] = {}
        self._error: BaseException | None = None
        threading.Thread(target=self._stream, daemon=True).start()

    def is_there(self) -> bool:
        """Answered once the cluster has found room for this worker."""
        return True

    def embed(self, job: SlideJob) -> SlideResult:
        """Embed a slide; several calls at once follow each other without a pause."""
        future = self._results[job.entry.name] = Future()
        if self._error is not None:
            raise self._error
        with suppress(Stopped):  # then the future has, or gets, what stopped the stream
            self._jobs.put(job)
        result = future.result()
        del self._results[job.entry.name]
        return result

    def _stream(self) -> None:
        from seal_extract.run.extract import extract_many

        try:
            encoders = [request.load() for request in self._requests]
            for result in extract_many(self._jobs, encoders, self._out, options=self._options):
                self._results[result.name].set_result(result)
        except BaseException as exc:  # what stops one slide here stops all, also those to come
            self._error = exc
            for future in list(self._results.values()):
                if not future.done():
                    future.set_exception(exc)


def _most_on_a_node(nodes: list[dict[str, Any]], workers: int, cores: int, gpus: int) -> int:
    """Workers that may come to share the disk of one node."""
    have = [node["Resources"] for node in nodes if node["Alive"]]
    room = (min(n.get("CPU", 0) // cores, n.get("GPU", 0) // gpus if gpus else workers) for n in have)
    return max(1, min(workers, int(max(room, default=1))))


def _say_who_is_missing(ray: Any, placed: list[Any], cores: int, gpus: int) -> bool:
    """Warn of workers for which the cluster has no room now; whether there are any."""
    _, missing = ray.wait(placed, num_returns=len(placed), timeout=0)
    if missing:
        warnings.warn(
            f"waiting for Ray to find room for {len(missing)} of {len(placed)} workers, each of {cores} cores"
            f"{' and a GPU' if gpus else ''}; `ray status` shows who has it",
            stacklevel=2,
        )
    return bool(missing)


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def _ray() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise UsageError(f"Ray is not installed; {how_to_install('ray')}") from exc
    return ray


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as exc:
        raise UsageError(
            f"no Ray cluster at {address!r} ({_first_line(exc)}); start one with `ray start --head`, or "
            "leave out --ray-address"
        ) from exc


def _knock(address: str | None) -> None:
    """Raise OSError where nobody answers at HOST:PORT; Ray itself would try for minutes, and say so often."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or "")
    if found is not None:
        socket.create_connection((found[1], int(found[2])), KNOCK_S).close()

"""A cohort on all GPUs of a Ray cluster: one actor per GPU, or per share of the cores; one task per slide.

Ray places the workers; how they share the cohort is in `workers`.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError, first_line, how_to_install
from seal_extract.run.job import Channel, SlideJob, Stopped
from seal_extract.run.options import ExtractOptions
from seal_extract.run.status_table import Progress, SlideResult
from seal_extract.run.workers import SLIDES_PER_WORKER, WARN_S, death, requests_of, share

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

CORES_PER_WORKER = 4  # where there is no GPU
CONNECT_S = 10.0  # for a head node to answer


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

    def placed(self, encoders: Sequence[EncoderRequest | Encoder]) -> list[EncoderRequest | Encoder]:
        """See `Engine.placed`; the nodes of a cluster may have GPUs although this one has none."""
        requests, ray = requests_of(encoders), sys.modules.get("ray")
        is_this_machine = self.address is None and not (ray and ray.is_initialized())
        undecided = [request for request in requests if request.device is None and request.precision is None]
        if is_this_machine or not undecided:
            return list(requests)
        with self._connected() as ray:
            places = shares(ray.nodes(), self.workers, self.cores)
        device = "cuda" if any(place.gpus for place in places) else "cpu"
        return [replace(r, device=device) if r in undecided else r for r in requests]

    def run(
        self,
        jobs: Sequence[SlideJob],
        encoders: Sequence[EncoderRequest | Encoder],
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        """Embed slides; results in any order, as soon as they are known. Progress is reported once per slide.

        Raises:
            UsageError: Ray is not installed, not reachable, or too small; or an encoder is no request.
        """
        requests = requests_of(encoders)
        with self._connected() as ray:
            yield from self._run(ray, jobs, requests, options, progress)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray, connected to the cluster; the connection ends with the block unless it was there before."""
        try:
            import ray
        except ImportError as exc:
            raise UsageError(f"Ray is not installed; {how_to_install('ray')}") from exc
        started = not ray.is_initialized()
        _connect(ray, self.address)
        try:
            yield ray
        finally:
            if started:
                ray.shutdown()

    def _run(
        self,
        ray: Any,
        jobs: Sequence[SlideJob],
        requests: list[EncoderRequest],
        options: ExtractOptions,
        progress: Progress | None,
    ) -> Iterator[SlideResult]:
        places = shares(ray.nodes(), self.workers, self.cores)
        if len(places) > len(jobs):
            places = shares(ray.nodes(), len(jobs), self.cores)
        beside = Counter(place.node for place in places)
        actors = [
            _Actor(ray, place, requests, _options_of(place, options, beside[place.node])) for place in places
        ]
        try:
            for result in share(jobs, actors):
                if progress is not None and result.features:
                    patches = len(result.features[0].grid)
                    progress(result.path, patches, patches)
                yield result
        finally:
            for actor in actors:
                actor.end()


@dataclass(frozen=True)
class Place:
    """Where a worker runs, and what it has there.

    Attributes:
        node: Ray's name for it.
        cores: of its own.
        gpus: 1, or 0 where no node has any.
    """

    node: str
    cores: int
    gpus: int


def shares(nodes: list[dict[str, Any]], workers: int | None = None, cores: int | None = None) -> list[Place]:
    """The places of the workers: those of one node have equal shares of that node's cores.

    If any node has a GPU, each worker takes one, and nodes without a GPU stay idle.

    Args:
        nodes: as `ray.nodes` gives them.
        workers: how many; one per GPU, or per `CORES_PER_WORKER` cores, by default.
        cores: of each; by default its share of the cores of its node.

    Raises:
        UsageError: the nodes have no room for them.
    """
    there = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    have = {name: (int(n.get("CPU", 0)), int(n.get("GPU", 0))) for name, n in there.items()}
    gpus = min(1, sum(gpu for _, gpu in have.values()))
    room = {name: min(cpu // (cores or 1), gpu if gpus else cpu) for name, (cpu, gpu) in have.items()}
    if workers is None and not gpus and cores is None:
        room = {name: max(1, cpu // CORES_PER_WORKER) for name, (cpu, _) in have.items() if cpu}
    if not 0 < (workers or 1) <= sum(room.values()):
        named = ", ".join(f"{cpu} cores and {gpu} GPUs" for cpu, gpu in have.values()) or "nothing"
        raise UsageError(
            f"the nodes of Ray ({named}) have no room for {workers or 1} workers of {cores or 1} cores"
            f"{' and a GPU' if gpus else ''}; leave out --ray-workers and --ray-cores, or start more nodes"
        )
    on = dict.fromkeys(room, 0)  # workers of each node
    for _ in range(workers or sum(room.values())):
        free = [name for name in room if on[name] < room[name]]
        on[max(free, key=lambda name: have[name][0] / (on[name] + 1))] += 1
    return [Place(name, cores or have[name][0] // n, gpus) for name, n in on.items() for _ in range(n)]


def _options_of(place: Place, options: ExtractOptions, beside: int) -> ExtractOptions:
    """Those of a worker, one of ``beside`` workers that share the disk of a node."""
    workers = options.workers or place.cores
    return replace(options.resolved(), workers=workers, stage_gb=options.stage_gb / beside)


class _Actor:
    """A worker as the driver sees it."""

    def __init__(
        self, ray: Any, place: Place, requests: list[EncoderRequest], options: ExtractOptions
    ) -> None:
        self.name = f"the worker of {place.cores} cores{' and a GPU' if place.gpus else ''}"
        self._ray, self._place, self._orders = ray, place, (requests, options)
        self._start()

    def _start(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._worker = (
            self._ray.remote(_Worker)
            .options(
                num_cpus=self._place.cores,
                num_gpus=self._place.gpus,
                max_concurrency=SLIDES_PER_WORKER,
                scheduling_strategy=NodeAffinitySchedulingStrategy(self._place.node, soft=True),
            )
            .remote(*self._orders)
        )
        self._is_there, self._asked = self._worker.is_there.remote(), monotonic()

    def embed(self, job: SlideJob) -> Future[SlideResult]:
        """See `Worker.embed`."""
        future: Future[SlideResult] = Future()

        def end(theirs: Future[SlideResult]) -> None:
            error: Any = theirs.exception()
            if error is None:
                future.set_result(theirs.result())
            else:  # the text of Ray's own error is a traceback
                is_of_task = isinstance(error, self._ray.exceptions.RayTaskError)
                future.set_exception(error.cause if is_of_task else error)

        self._worker.embed.remote(job).future().add_done_callback(end)
        return future

    def restart(self) -> None:
        """See `Worker.restart`."""
        self.end()
        self._start()

    def notes(self) -> Iterator[str]:
        """See `Worker.notes`."""
        late = monotonic() - self._asked > WARN_S
        if late and not self._ray.wait([self._is_there], timeout=0)[0]:
            yield f"waiting for Ray to find room for {self.name}; `ray status` shows who has it"

    def end(self) -> None:
        """End the worker, whatever it is doing."""
        self._ray.kill(self._worker)


class _Worker:
    """One stream over the slides that it receives; each call waits for its own slide."""

    def __init__(self, requests: list[EncoderRequest], options: ExtractOptions) -> None:
        self._requests, self._options = requests, options
        self._jobs: Channel[SlideJob] = Channel()
        self._results: dict[str, Future[SlideResult]] = {}
        self._error: BaseException | None = None
        threading.Thread(target=self._stream, daemon=True).start()

    def is_there(self) -> bool:
        """Answers once the cluster has found room for this worker."""
        return True

    def embed(self, job: SlideJob) -> SlideResult:
        """Embed a slide; concurrent calls follow each other without a pause."""
        future = self._results[job.entry.name] = Future()
        if self._error is not None:
            raise self._error
        with suppress(Stopped):  # the future then raises what stopped the stream
            self._jobs.put(job)
        result = future.result()
        del self._results[job.entry.name]
        return result

    def _stream(self) -> None:
        from seal_extract.run.extract import extract_jobs

        is_ready = False
        try:
            encoders = [request.load() for request in self._requests]
            is_ready = True
            for result in extract_jobs(self._jobs, encoders, self._options):
                self._results[result.name].set_result(result)
        except BaseException as exc:  # it stops the other slides too, and those to come
            self._error = death(exc, ready=is_ready)
            for future in list(self._results.values()):
                if not future.done():
                    future.set_exception(self._error)


def _connect(ray: Any, address: str | None) -> None:
    if ray.is_initialized():
        return
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as exc:
        raise UsageError(
            f"no Ray cluster at {address!r} ({first_line(exc)}); start one with `ray start --head`, or "
            "leave out --ray-address"
        ) from exc


def _check_answers(address: str | None) -> None:
    """Raise OSError if nothing answers at HOST:PORT: Ray itself would retry for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address or "")
    if found is not None:
        socket.create_connection((found[1], int(found[2])), CONNECT_S).close()

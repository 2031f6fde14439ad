"""A cohort on all GPUs of a Ray cluster: one actor per GPU, or per share of the cores; one task per slide.

Ray does the scheduling, restarts and retries. A slide whose worker died is given to a restarted worker. That
finds no half-written features, because features get their names only when they are complete.
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
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import SlideOpenError, UsageError, first_line, how_to_install
from seal_extract.run.job import Channel, SlideJob, Stopped
from seal_extract.run.options import ExtractOptions
from seal_extract.run.status_table import Progress, SlideResult

if TYPE_CHECKING:
    from seal_extract.encoders import Encoder

SLIDES_PER_WORKER = 4  # given to it at a time: one is encoded, the next are opened
CORES_PER_WORKER = 4  # where there is no GPU
RETRIES = 3  # of a slide whose worker died
WARN_S = 30.0  # without a finished slide, until a warning names the workers that have no room
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
        requests = [e for e in encoders if isinstance(e, EncoderRequest)]
        if len(requests) < len(encoders):
            raise UsageError("workers load encoders by themselves; give their names, not loaded encoders")
        try:
            import ray
        except ImportError as exc:
            raise UsageError(f"Ray is not installed; {how_to_install('ray')}") from exc
        started = not ray.is_initialized()
        _connect(ray, self.address)
        try:
            yield from self._run(ray, jobs, requests, options, progress)
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
        workers, cores, gpus = shares(ray.nodes(), self.workers, self.cores)
        workers = min(workers, len(jobs))
        actor = ray.remote(_Worker).options(
            num_cpus=cores,
            num_gpus=gpus,
            max_concurrency=SLIDES_PER_WORKER,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        shared = replace(
            options, stage_gb=options.stage_gb / _most_on_a_node(ray.nodes(), workers, cores, gpus)
        )
        theirs = replace(shared.resolved(), workers=options.workers or cores)
        actors = [actor.remote(requests, theirs) for _ in range(workers)]
        waiting = [job.resolved() for job in reversed(jobs)]
        original = {job.entry.name: job.entry for job in jobs}
        placed = [one.is_there.remote() for one in actors]
        running: dict[Any, tuple[Any, SlideJob]] = {}
        warned = False

        def submit(actor: Any) -> None:
            job = waiting.pop()
            running[actor.embed.remote(job)] = actor, job

        for i in range(min(len(waiting), SLIDES_PER_WORKER * workers)):
            submit(actors[i % workers])
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=None if warned else WARN_S)
            if not ready:
                warned = _warn_of_missing(ray, placed, cores, gpus)
                continue
            free, job = running.pop(ready[0])
            if waiting:
                submit(free)
            try:
                result: SlideResult = ray.get(ready[0])
            except ray.exceptions.RayTaskError as exc:  # its text is a traceback
                raise exc.cause from None
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as exc:
                died = SlideOpenError(
                    f"{job.entry.source}: its worker died {RETRIES + 1} times ({first_line(exc)}); "
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
    """The number of workers, and the cores and GPUs of each, so that every worker fits on one node.

    If any node has a GPU, each worker takes one, and nodes without a GPU stay idle.

    Args:
        nodes: as `ray.nodes` gives them.
        workers: how many; one per GPU, or per `CORES_PER_WORKER` cores, by default.
        cores: of each; the most with which all of them have room, by default.

    Raises:
        UsageError: the nodes have no room for them.
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

        try:
            encoders = [request.load() for request in self._requests]
            for result in extract_jobs(self._jobs, encoders, self._options):
                self._results[result.name].set_result(result)
        except BaseException as exc:  # it stops the other slides too, and those to come
            self._error = exc
            for future in list(self._results.values()):
                if not future.done():
                    future.set_exception(exc)


def _most_on_a_node(nodes: list[dict[str, Any]], workers: int, cores: int, gpus: int) -> int:
    """The largest number of workers that can share the disk of one node."""
    have = [node["Resources"] for node in nodes if node["Alive"]]
    room = (min(n.get("CPU", 0) // cores, n.get("GPU", 0) // gpus if gpus else workers) for n in have)
    return max(1, min(workers, int(max(room, default=1))))


def _warn_of_missing(ray: Any, placed: list[Any], cores: int, gpus: int) -> bool:
    """Warn of the workers for which the cluster has no room now; returns whether there are any."""
    _, missing = ray.wait(placed, num_returns=len(placed), timeout=0)
    if missing:
        warnings.warn(
            f"waiting for Ray to find room for {len(missing)} of {len(placed)} workers, each of {cores} cores"
            f"{' and a GPU' if gpus else ''}; `ray status` shows who has it",
            stacklevel=2,
        )
    return bool(missing)


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

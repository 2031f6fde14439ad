"""Check this machine: everything that a run depends on is tested separately, to tell causes apart."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from seal_extract.encoders.cache import cache_folder
from seal_extract.encoders.hub import endpoint, translate
from seal_extract.encoders.registry import list_encoders
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import SealExtractError, first_line

if TYPE_CHECKING:
    import torch

State = Literal["ok", "note", "FAILS"]
ENOUGH_DISK_GB = 20  # the largest encoder's files and some thousand slides' features


@dataclass(frozen=True)
class CheckResult:
    """The result of one check; a ``note`` is worth knowing and stops no run."""

    subject: str
    state: State
    text: str

    def __str__(self) -> str:
        return f"{self.state:<5}  {self.subject:<10}  {self.text}"


def examine(
    slide: Path | None = None,
    *,
    slide_mpp: float | None = None,
    override_mpp: float | None = None,
    encoder: EncoderRequest | None = None,
    offline: bool = False,
) -> Iterator[CheckResult]:
    """Run all checks, one result at a time.

    Args:
        slide: if given, open it, find its tissue and encode 8 patches with an untrained encoder.
        slide_mpp: its µm/px, if the file does not state it.
        override_mpp: its µm/px, whatever the file states.
        encoder: if given, load it and report its files and the adapters that were merged.
        offline: leave out the checks that need the network.
    """
    yield from (_checked("python", _python), _checked("readers", _readers), _checked("device", _device))
    yield from (_checked("disk", _disk), _checked("cache", _cache))
    if not offline:
        network = _checked("network", _network)
        yield network
        if network.state == "ok":
            yield _checked("token", _token)
            for source in dict.fromkeys(spec.source for spec in list_encoders() if spec.layout.gated):
                yield _checked("gate", partial(_gate, source))
    if encoder is not None:
        yield from _encoder(encoder)
    if slide is not None:
        yield _checked("slide", partial(_slide, slide, slide_mpp, override_mpp))


def _checked(subject: str, check: Callable[[], tuple[State, str]]) -> CheckResult:
    try:
        return CheckResult(subject, *check())
    except SealExtractError as exc:
        return CheckResult(subject, "FAILS", str(exc))
    except Exception as exc:  # a broken installation may raise anything; the other checks continue
        return CheckResult(subject, "FAILS", f"{type(exc).__name__}: {first_line(exc)}")


def _python() -> tuple[State, str]:
    names = ("seal-extract", "torch", "timm", "huggingface_hub")
    return "ok", f"{platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names)


def _readers() -> tuple[State, str]:
    import openslide
    import tiffslide  # noqa: F401  imported to check that it works

    from seal_extract.slides.readers import openslide_danger

    if danger := openslide_danger():
        return "FAILS", danger
    return "ok", f"OpenSlide {openslide.__library_version__}, tiffslide {version('tiffslide')}"


def _device() -> tuple[State, str]:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        for i, card in enumerate(cards):
            if failure := _try_card(torch.device("cuda", i)):
                return "FAILS", (
                    f"cuda:{i}, {card.name} of compute capability {card.major}.{card.minor}, cannot multiply "
                    f"matrices by torch {torch.__version__} ({failure}); install the torch build that fits "
                    "card and driver, or type --device cpu"
                )
        return "ok", ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
    if shutil.which("nvidia-smi"):
        return "FAILS", (
            f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {torch.version.cuda}) sees no "
            "card; install the torch build that fits the driver"
        )
    return "note", f"there is no NVIDIA card; encoders run slowly, on {torch.get_num_threads()} CPU threads"


def _try_card(device: torch.device) -> str | None:
    """What is wrong with a card that should multiply two small matrices; None if nothing is."""
    import torch

    try:
        ones = torch.ones(64, 64, dtype=torch.float16, device=device)
        product = (ones @ ones).float().sum().item()
    except RuntimeError as exc:
        return first_line(exc)
    return None if product == 64**3 else f"the sum of a product is {product:g}, not {64**3}"


def _disk() -> tuple[State, str]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return ("ok" if free > ENOUGH_DISK_GB else "note"), f"{free:.0f} GB free in the current folder"


def _cache() -> tuple[State, str]:
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free / 1e9
    probe = existing / ".seal_extract_probe"
    try:
        probe.touch()
    except OSError as exc:
        return "FAILS", f"{folder} cannot be written ({exc.strerror}); choose another folder with HF_HOME"
    finally:
        with suppress(OSError):
            probe.unlink()
    return ("ok" if free > ENOUGH_DISK_GB else "note"), f"{folder}, {free:.0f} GB free"


def _network() -> tuple[State, str]:
    from huggingface_hub import HfApi

    try:
        HfApi(endpoint=endpoint()).model_info("gpt2", token=False, timeout=10)
    except Exception as exc:
        if getattr(exc, "response", None) is None:  # a refusal is an answer too
            return "FAILS", (
                f"cannot reach {endpoint()} ({first_line(exc)}); check network and proxy, "
                "or work with --offline and a filled cache"
            )
    return "ok", f"{endpoint()} answers"


def _token() -> tuple[State, str]:
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        return "note", "there is none; gated encoders need one: type hf auth login"
    try:
        return "ok", f"of {HfApi(endpoint=endpoint()).whoami()['name']}"
    except Exception as exc:
        return "FAILS", f"the Hub does not accept it ({first_line(exc)}); type: hf auth login"


def _gate(repo_id: str) -> tuple[State, str]:
    from huggingface_hub import HfApi

    try:
        HfApi(endpoint=endpoint()).auth_check(repo_id)
    except Exception as exc:
        return "note", str(translate(exc, repo_id, ["its files"], None))
    return "ok", f"{repo_id} may be downloaded"


def _encoder(request: EncoderRequest) -> Iterator[CheckResult]:
    """Check that it loads; then one result for each of its files and each kind of merged adapters."""
    loaded = _checked("encoder", lambda: ("ok", str(request.load())))
    yield loaded
    if loaded.state != "ok":
        return
    for file in request.load().weights:
        pin = {True: "the pinned one", False: "NOT the pinned one", None: "its row has no pin"}[file.pinned]
        state: State = "note" if file.pinned is False else "ok"
        yield CheckResult("file", state, f"{file.file} of {file.source}, sha256 {file.sha256[:12]}, {pin}")
    for one in request.load().merged:
        what = f"{len(one['layers'])} layers of {one['file']}, rank {one['rank']}, scale {one['scale']:g}"
        yield CheckResult("merged", "ok", f"{what}: {', '.join(one['layers'])}")


def _slide(path: Path, slide_mpp: float | None, override_mpp: float | None) -> tuple[State, str]:
    from dataclasses import replace

    from seal_extract.demo import untrained_encoder
    from seal_extract.patches.reader import open_patch_reader
    from seal_extract.patches.stream import stream_batches
    from seal_extract.run.job import find_tissue_and_grid
    from seal_extract.run.options import ExtractOptions
    from seal_extract.slides.entry import SlideEntry, open_entry

    with open_entry(SlideEntry.of(path), slide_mpp, override_mpp) as slide:
        _, grid, _ = find_tissue_and_grid(slide, ExtractOptions(allow_upsampling=True))
        encoder = untrained_encoder()
        few = replace(grid, xy_l0=grid.xy_l0[:8])
        stream = stream_batches([open_patch_reader(slide, few, encoder.device)], 8, device=encoder.device)
        shapes = [list(encoder.encode(batch.patches).shape) for batch in stream]
        return "ok", f"{slide}, {grid}, first batch encoded: {shapes[0] if shapes else 'no tissue'}"

"""All errors that this package raises on purpose, as one family.

    SealExtractError
    ├── UsageError             the request makes no sense: an unknown name, options that contradict each other
    ├── SlideError             the slide
    │   ├── SlideOpenError       missing, not a slide, damaged
    │   ├── UnsupportedSlideError  opens, but is not 8-bit RGB brightfield
    │   ├── ResolutionError      µm/px missing, implausible, or coarser than the target
    │   └── ReadError            a region cannot be read; names its level-0 pixels
    ├── GeometryError          tissue polygons, grids, coordinates of other tools
    ├── EncoderError           the encoder
    │   ├── CheckpointError      keys, shapes, dtypes, unsafe pickles
    │   ├── HubError             the Hub
    │   │   ├── TokenError         no token, or one the Hub does not know
    │   │   ├── GateError          the licence page was not accepted
    │   │   ├── MissingOnHubError  repository, revision or file does not exist
    │   │   └── NetworkError       the Hub cannot be reached, or must not be (offline)
    │   └── DeviceError          the GPU has stopped, and this process cannot use it any more
    ├── OutputError            disk full, folder not writable, file of another run in the way
    └── UnexpectedError        an error that this package did not foresee; carries the traceback

A message is one line: what came, what is allowed, what to type instead. Errors of other libraries are
translated where they appear and stay reachable as ``__cause__``.
"""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

NAME_TOO_LONG = "the name is too long for that disk; rename the slide or choose another -o"


def how_to_install(extra: str) -> str:
    """The command that installs an optional part; the package is on no index yet, only in clones."""
    return f'type, in your clone of seal-extract: pip install ".[{extra}]"'


def first_line(error: object) -> str:
    """The message of an error, often another library's, in one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class SealExtractError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what the command line returns."""

    exit_status = 1


class UsageError(SealExtractError, ValueError):
    """The request makes no sense."""

    exit_status = 2


class SlideError(SealExtractError):
    """Something about the slide."""


class SlideOpenError(SlideError):
    """The file is missing, is not a slide, or is damaged."""


class UnsupportedSlideError(SlideError):
    """The slide opens but is not 8-bit RGB brightfield."""


class ResolutionError(SlideError):
    """µm/px is missing, implausible, or coarser than the target."""


class ReadError(SlideError):
    """A region of the slide cannot be read; the message names its level-0 pixels."""


class GeometryError(SealExtractError):
    """Tissue polygons, a patch grid or another tool's coordinates do not fit the slide."""


class EncoderError(SealExtractError):
    """Something about the encoder."""


class CheckpointError(EncoderError):
    """A weight file does not hold exactly what the encoder needs."""


class HubError(EncoderError):
    """The Hub did not give the file."""


class TokenError(HubError):
    """No token, or one the Hub does not accept."""


class GateError(HubError):
    """The repository is gated and access was not granted to this account."""


class MissingOnHubError(HubError):
    """Repository, revision or file does not exist on the Hub."""


class NetworkError(HubError):
    """The Hub cannot be reached, or offline mode forbids to ask and the cache has no copy."""


class DeviceError(EncoderError):
    """The GPU has stopped, and this process cannot use it any more; another process can."""


class OutputError(SealExtractError):
    """The result cannot be written."""


class UnexpectedError(SealExtractError):
    """A defect of this package that one slide revealed.

    Attributes:
        details: the traceback as text, which survives the way from another process.
    """

    details: str = ""


# CUDA returns each of these from every later call too, unlike a lack of memory
_LOST = (
    *("illegal memory access", "illegal instruction", "illegal address", "misaligned address"),
    *("device-side assert", "unspecified launch failure", "invalid program counter", "hardware stack error"),
    *("uncorrectable ECC error", "NVLink error", "GPU is lost", "launch timed out"),
)


def is_of_lost_device(error: BaseException) -> TypeGuard[RuntimeError]:
    """Whether an error of torch means that its process cannot use the GPU any more."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


@contextmanager
def embedding(what: str) -> Iterator[None]:
    """Turn what torch raises about a GPU that has stopped into one line, where no slide is cut.

    Raises:
        DeviceError: the GPU has stopped.
    """
    try:
        yield
    except RuntimeError as exc:
        if not is_of_lost_device(exc):
            raise
        raise DeviceError(
            f"the GPU stopped when {what} was embedded ({first_line(exc)}); type the same command again; if "
            "it stops there again, add --device cpu"
        ) from exc


def as_ours(error: Exception, slide: str) -> SealExtractError:
    """Any error that stopped a slide, as one of ours; messages name the slide as ``slide``."""
    if isinstance(error, SealExtractError):
        return error
    why = first_line(error)
    if is_of_lost_device(error):
        return DeviceError(
            f"the GPU stopped when {slide} was embedded ({why}); finished slides are kept, type the same "
            "command again to continue; if it stops there again, add --gpu-decode off or --device cpu"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # the name of its results
        return OutputError(f"{slide}: {NAME_TOO_LONG}; nothing half-written was left")
    if isinstance(error, OSError):  # of reading; writing translates its own
        return SlideOpenError(f"{slide} can no longer be read: {error.strerror or why}; check its disk")
    if isinstance(error, MemoryError):
        return SlideOpenError(f"{slide} needs more memory than there is ({why})")
    unexpected = UnexpectedError(f"{slide}: unexpected {type(error).__name__}: {why}; --debug shows where")
    unexpected.details = "".join(traceback.format_exception(error))
    return unexpected

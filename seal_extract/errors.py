"""Everything this package refuses, as one family.

    SealExtractError
    ├── UsageError             what was asked cannot be meant: an unknown name, options that contradict
    ├── SlideError             the slide
    │   ├── SlideOpenError       missing, not a slide, damaged
    │   ├── UnsupportedSlideError  opens, but is not 8-bit RGB brightfield
    │   ├── ResolutionError      µm/px missing, implausible, or coarser than the target
    │   └── ReadError            a region cannot be read; names its level-0 pixels
    ├── GeometryError          tissue polygons, grids, coordinates of other tools
    ├── EncoderError           the encoder
    │   ├── CheckpointError      keys, shapes, dtypes, unsafe pickles
    │   └── HubError             the Hub
    │       ├── TokenError         no token, or one the Hub does not know
    │       ├── GateError          the licence page was not accepted
    │       ├── MissingOnHubError  repository, revision or file does not exist
    │       └── NetworkError       the Hub cannot be reached, or must not be (offline)
    ├── OutputError            disk full, folder not writable, file of another run in the way
    └── UnexpectedError        what this package should have refused by name; carries the traceback

A message is one line: what came, what is allowed, what to type instead. Errors of the libraries
underneath are translated where they appear and stay reachable as ``__cause__``.
"""

import errno
import traceback

NAME_TOO_LONG = "the name is too long for that disk; rename the slide or choose another -o"


def how_to_install(extra: str) -> str:
    """What to type where an optional part is missing; the package is on no index yet, only in clones."""
    return f'type, in your clone of seal-extract: pip install ".[{extra}]"'


class SealExtractError(Exception):
    """Base of all errors raised on purpose; ``exit_status`` is what the command line returns."""

    exit_status = 1


class UsageError(SealExtractError, ValueError):
    """What was asked for cannot be meant."""

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


class OutputError(SealExtractError):
    """The result cannot be written where it was asked for."""


class UnexpectedError(SealExtractError):
    """A defect of this package, met on one slide.

    Attributes:
        details: the traceback, as text, which also survives the way from another process.
    """

    details: str = ""


def as_ours(error: Exception, slide: str) -> SealExtractError:
    """What stopped a slide, whatever it was, as one of our errors; ``slide`` is how messages name it."""
    if isinstance(error, SealExtractError):
        return error
    why = " ".join(str(error).split())[:300]
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # of its results: the slide is there
        return OutputError(f"{slide}: {NAME_TOO_LONG}; nothing half-written was left")
    if isinstance(error, OSError):  # the slide's own: what is written is translated where it is written
        return SlideOpenError(f"{slide} can no longer be read: {error.strerror or why}; check its disk")
    if isinstance(error, MemoryError):
        return SlideOpenError(f"{slide} needs more memory than there is ({why or 'MemoryError'})")
    unexpected = UnexpectedError(f"{slide}: unexpected {type(error).__name__}: {why}; --debug shows where")
    unexpected.details = "".join(traceback.format_exception(error))
    return unexpected

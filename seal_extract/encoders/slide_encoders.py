"""Slide encoders: the patch features that each was trained on, and the weights of those that run here.

The rows are in ``slide_encoders.toml``. A slide encoder whose row has a `Published` runs here: its network is
one that `seal_extract.pooling.checkpoint` reads. The others run code of their authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from seal_extract.encoders.registry import ALIASES
from seal_extract.encoders.spec import Published, TrainedOn
from seal_extract.errors import UsageError


@dataclass(frozen=True)
class SlideEncoder(TrainedOn):
    """A model that makes one embedding of the patch features of a slide.

    Attributes:
        name: as ``--slide-level`` and ``verify --for`` take it.
        encoder: of the patches, as ``--encoder`` takes it.
        encoder_dim: length of that encoder's embeddings.
        patch_px: side of the patches it was trained on.
        mpp: µm/px of those patches.
        licence: of the weights, as their page states it.
        source: repository on the Hub; empty if the weights are elsewhere.
        paper: where it is described.
        input: how that encoder resizes and crops a patch, in the words of `InputRule`; empty if not stated.
        known_as: names of that encoder in the files of other tools, beside its aliases.
        positions: whether it reads ``coords`` in level-0 pixels and their ``patch_size_level0``.
        network: whose names the layers of its weight file have; empty if it does not run here.
        published: its weight file; None if it does not run here.
    """

    name: str
    encoder: str
    encoder_dim: int
    patch_px: int
    mpp: float
    licence: str
    source: str = ""
    paper: str = ""
    input: str = ""
    known_as: tuple[str, ...] = ()
    positions: bool = False
    network: str = ""
    published: Published | None = None

    @property
    def layout(self) -> Published:
        """The layout of its weight file; without files where it does not run here."""
        return self.published or Published(files=())

    @property
    def command(self) -> str:
        """The command that makes features for it."""
        patches = f"--patch-px {self.patch_px} --mpp {self.mpp:g}"
        run = f"seal-extract SLIDES -o OUT --encoder {self.encoder} {patches}"
        file = "" if self.source else "=FILE"
        return f"{run} --slide-level {self.name}{file}" if self.published else run

    def is_of(self, encoder: str) -> bool:
        """Whether it takes features of this encoder, whose name may be an alias."""
        return ALIASES.get(encoder, encoder) == self.encoder or encoder in self.known_as


def _read_table() -> tuple[dict[str, SlideEncoder], dict[str, str]]:
    """The rows of ``slide_encoders.toml``, and the name that each alias stands for."""
    tables: dict[str, Any] = msgspec.toml.decode(Path(__file__).with_suffix(".toml").read_bytes())
    rows = {name: msgspec.convert({"name": name, **table}, SlideEncoder) for name, table in tables.items()}
    return rows, {alias: name for name, table in tables.items() for alias in table.get("also_called", ())}


SLIDE_ENCODERS, _ALIASES = _read_table()


def find_slide_encoder(name: str) -> SlideEncoder | None:
    """The row of a name, or of an alias of it; None if there is none."""
    return SLIDE_ENCODERS.get(_ALIASES.get(name, name))


def names_that_run() -> list[str]:
    """What ``--slide-level`` takes beside the mean and files."""
    return [f"{row.name}{'' if row.source else '=FILE'}" for row in SLIDE_ENCODERS.values() if row.published]


def refuse_foreign(row: SlideEncoder) -> None:
    """Refuse a slide encoder that does not run here.

    Raises:
        UsageError: it needs its authors' code.
    """
    if row.published is None:
        raise UsageError(
            f"{row.name} runs code of its authors and not here; its features are made by: {row.command}, and "
            f"checked by: seal-extract verify OUT --for {row.name}"
        )

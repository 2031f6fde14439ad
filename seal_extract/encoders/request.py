"""An encoder that was asked for and is not loaded: finished slides need its identity, not its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.hub import FoundFile
from seal_extract.encoders.locate import is_name, locate
from seal_extract.encoders.registry import EncoderSpec, check_precision, find_spec
from seal_extract.errors import UsageError

if TYPE_CHECKING:
    from seal_extract.encoders.encoder import Encoder


@dataclass(frozen=True)
class EncoderRequest:
    """The arguments of `load_encoder`, which `load` calls once."""

    name_or_path: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    revision: str | None = None
    device: str | None = None
    precision: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        """Refuse what can be refused before the network is asked.

        Raises:
            UsageError: no such name, precision or kind of device.
        """
        check_precision(self.precision)
        if is_name(self.name_or_path):
            find_spec(str(self.name_or_path))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device!r}; allowed: cpu, cuda, cuda:0, ...")

    @property
    def spec(self) -> EncoderSpec:
        """The row asked for; a name is looked up without the network."""
        return find_spec(str(self.name_or_path)) if is_name(self.name_or_path) else self._located[0]

    def load(self) -> Encoder:
        """The encoder, loaded at the first call; see `load_encoder` for what can go wrong."""
        return self._encoder

    def identity_if_unchanged(self, recorded: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """`Encoder.identity`, told from size and time of the weight file without reading it.

        Args:
            recorded: the weight files that a former run wrote down, the main one first.

        Returns:
            None where the file is not the recorded one to all appearance, so that its hash has to be taken.
        """
        if not recorded:
            return None
        file, before = self._located[1].path, recorded[0]
        stat = file.stat() if file.is_file() else None
        seen = stat and (file.name, stat.st_size, stat.st_mtime_ns)
        if seen != (before["file"], before["size"], before["mtime_ns"]):
            return None
        return self.spec.identity([w["sha256"] for w in recorded], self._precision)

    @property
    def _precision(self) -> str:
        """As `load_encoder` decides; torch, slow to import, is asked for a GPU only where that matters."""
        asked = check_precision(self.precision)
        at_best, at_least = (self.spec.precision_for(kind, asked) for kind in ("cuda", "cpu"))
        if at_best == at_least or str(self.device).startswith("cpu"):
            return at_least
        import torch

        return at_best if self.device or torch.cuda.is_available() else at_least

    @cached_property
    def _located(self) -> tuple[EncoderSpec, FoundFile]:
        return locate(self.name_or_path, self.checkpoint, self.revision, self.offline)

    @cached_property
    def _encoder(self) -> Encoder:
        from seal_extract.encoders.build import load_encoder

        return load_encoder(**asdict(self))

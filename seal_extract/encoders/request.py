"""An encoder that was asked for and is not loaded: finished slides need its identity, not its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from seal_extract.encoders.build import load_encoder, resolve_device, resolve_precision
from seal_extract.encoders.encoder import Encoder, describe_identity
from seal_extract.encoders.hub import FoundFile
from seal_extract.encoders.locate import locate
from seal_extract.encoders.registry import EncoderSpec


@dataclass(frozen=True)
class EncoderRequest:
    """The arguments of `load_encoder`, which `load` calls once."""

    name_or_path: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    revision: str | None = None
    device: str | None = None
    precision: str | None = None
    offline: bool = False

    @property
    def spec(self) -> EncoderSpec:
        """The row asked for."""
        return self._located[0]

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
        dtype = resolve_precision(self.precision, self.spec, resolve_device(self.device))
        return describe_identity(self.spec, [w["sha256"] for w in recorded], dtype)

    @cached_property
    def _located(self) -> tuple[EncoderSpec, FoundFile]:
        return locate(self.name_or_path, self.checkpoint, self.revision, self.offline)

    @cached_property
    def _encoder(self) -> Encoder:
        return load_encoder(**asdict(self))

"""An encoder that was asked for and is not loaded: finished slides need its identity, not its weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seal_extract.encoders.files import FoundFile
from seal_extract.encoders.locate import ADAPTER_CONFIG, adapted, is_name, locate, locate_adapter
from seal_extract.encoders.registry import find_spec
from seal_extract.encoders.spec import EncoderSpec, check_precision
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
    adapter: str | os.PathLike[str] | None = None

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

    @cached_property
    def spec(self) -> EncoderSpec:
        """The row asked for, under the name of its results; a name is looked up without the network."""
        spec = find_spec(str(self.name_or_path)) if is_name(self.name_or_path) else self._located[0]
        return spec if self.adapter is None else adapted(spec, self.adapter)

    def load(self) -> Encoder:
        """The encoder, loaded at the first call; see `load_encoder` for what can go wrong."""
        return self._encoder

    def identity_if_unchanged(self, recorded: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """`Encoder.identity`, told from size and time of the files without reading them.

        Args:
            recorded: the weight files that a former run wrote down, the main one first.

        Returns:
            None where the file is not the recorded one to all appearance, so that its hash has to be taken.
        """
        adapter = self._located_adapter
        with_adapter = bool(recorded) and recorded[-1]["file"] == ADAPTER_CONFIG
        if not recorded or with_adapter != bool(adapter):
            return None
        spec, file = self._located
        settings = () if file.settings is None else (file.settings,)
        with_settings = spec.published is not None and spec.published.settings in [
            w["file"] for w in recorded
        ]
        if with_settings != bool(settings):
            return None
        files = (file.path, *settings, *(f.path for f in adapter))
        before = (*recorded[: 1 + len(settings)], *recorded[len(recorded) - len(adapter) :])
        if not all(_is_unchanged(path, b) for path, b in zip(files, before, strict=True)):
            return None
        spec = spec if self.adapter is None else adapted(spec, self.adapter)
        return spec.identity([w["sha256"] for w in recorded], self._precision)

    @cached_property
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
    def _located_adapter(self) -> tuple[FoundFile, ...]:
        return () if self.adapter is None else locate_adapter(self.adapter, self.offline)

    @cached_property
    def _encoder(self) -> Encoder:
        from seal_extract.encoders.build import load_encoder

        return load_encoder(**asdict(self))


def _is_unchanged(path: Path, before: Mapping[str, Any]) -> bool:
    stat = path.stat() if path.is_file() else None
    seen = stat and (path.name, stat.st_size, stat.st_mtime_ns)
    return seen == (before["file"], before["size"], before["mtime_ns"])

"""An encoder that was asked for but is not loaded: finished slides are recognised without its weights."""

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
from seal_extract.publish import file_state

if TYPE_CHECKING:
    from seal_extract.encoders.encoder import Encoder


@dataclass(frozen=True)
class EncoderRequest:
    """The arguments of `load_encoder`.

    Raises:
        UsageError: no such name, precision or kind of device; the network is not asked.
    """

    name_or_path: str | os.PathLike[str]
    checkpoint: str | os.PathLike[str] | None = None
    revision: str | None = None
    device: str | None = None
    precision: str | None = None
    offline: bool = False
    adapter: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)
        if is_name(self.name_or_path):
            find_spec(str(self.name_or_path))
        if self.device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"device is {self.device!r}; allowed: cpu, cuda, cuda:0, ...")

    @cached_property
    def spec(self) -> EncoderSpec:
        """The row asked for, under the name of its results; for a name the network is not used."""
        spec = find_spec(str(self.name_or_path)) if is_name(self.name_or_path) else self._located[0]
        return spec if self.adapter is None else adapted(spec, self.adapter)

    def load(self) -> Encoder:
        """The encoder, loaded at the first call; raises as `load_encoder` does."""
        return self._encoder

    def identity_if_unchanged(self, recorded: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """`Encoder.identity`, from names, sizes and times of the weight files, without reading them.

        Args:
            recorded: the weight files that an earlier run recorded, the main one first.

        Returns:
            None if a file differs from the recorded one, so that its hash has to be computed.
        """
        spec, file = self._located
        settings = () if file.settings is None else (file.settings,)
        files = (file.path, *settings, *(f.path for f in self._located_adapter))
        names = [w["file"] for w in recorded]
        optional = {ADAPTER_CONFIG, spec.published.settings if spec.published else None}
        if optional.intersection(names) != optional.intersection(path.name for path in files):
            return None
        before = {w["file"]: w for w in reversed(recorded)}  # the main file is the first of its name
        if not names or names[0] != file.path.name or not all(_is_unchanged(p, before) for p in files):
            return None
        spec = spec if self.adapter is None else adapted(spec, self.adapter)
        return spec.identity([w["sha256"] for w in recorded], self._precision)

    @cached_property
    def _precision(self) -> str:
        """As `load_encoder` decides; torch is imported only where the answer depends on a GPU."""
        if asked := check_precision(self.precision):
            return asked
        on_gpu, elsewhere = (self.spec.precision_for(kind) for kind in ("cuda", "cpu"))
        if on_gpu == elsewhere or str(self.device).startswith("cpu"):
            return elsewhere
        import torch

        return on_gpu if self.device or torch.cuda.is_available() else elsewhere

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


def _is_unchanged(path: Path, recorded: Mapping[str, Mapping[str, Any]]) -> bool:
    before = recorded.get(path.name)
    if before is None or not path.is_file():
        return False
    return file_state(path) == (before["size"], before["mtime_ns"])

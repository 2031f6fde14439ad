"""The device of a section, and a stopwatch for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import time

import torch

from seal_extract.bench.measure import timed

Row = tuple[str, str, str]  # of the table: what, figure, note
Found = Iterator[tuple[dict[str, object], list[Row]]]  # of a section: all of it so far, after each step


@dataclass(frozen=True)
class Card:
    """Where a section works.

    Attributes:
        rehearsal: on a CPU, with sizes that only show that every line runs.
        folder: of files that sections share.
        until: seconds since the epoch at which the run must have ended.
        share: of the time left that this section may take.
    """

    rehearsal: bool
    folder: Path
    until: float
    share: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearsal else "cuda")

    @property
    def left_s(self) -> float:
        return (self.until - time()) * self.share

    def size(self, on_card: int, in_rehearsal: int) -> int:
        return in_rehearsal if self.rehearsal else on_card

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """The median, after one run to warm up."""
        timed(work, self.device)
        return median(timed(work, self.device).wall_s for _ in range(1 if self.rehearsal else repeats))

    def matrix_rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Floating-point operations a second in products of large square matrices."""
        side, products = self.size(8192, 64), 10
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            return products * 2 * side**3 / self.seconds(lambda: [torch.mm(a, b) for _ in range(products)])
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

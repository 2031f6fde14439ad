"""Slides that never were: an H&E-like picture in an Aperio-style pyramid, for tests, demo and benchmarks."""

from seal_extract.synthetic.anatomy import tissue_truth
from seal_extract.synthetic.aperio import write_synthetic_slide

__all__ = ["tissue_truth", "write_synthetic_slide"]

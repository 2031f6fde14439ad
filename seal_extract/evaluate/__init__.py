"""How much of gene expression embeddings hold, beside what colour alone, chance and the base encoder reach.

Stages: `leave_one_out` -> `score_fold` of every line -> `Table`. Arrays in, records out: where patches come
from and who embeds them is not asked here.
"""

from seal_extract.evaluate.compare import Comparison, Line, compare, permuted_rows
from seal_extract.evaluate.expression import (
    HEST,
    TUNED,
    Fold,
    FoldScore,
    Probe,
    fit_probe,
    leave_one_out,
    pearson,
    score_fold,
)
from seal_extract.evaluate.handmade import FEATURES, handmade_features
from seal_extract.evaluate.retrieval import Retrieval, retrieve
from seal_extract.evaluate.table import Row, Table, tables, to_csv

__all__ = [
    "FEATURES",
    "HEST",
    "TUNED",
    "Comparison",
    "Fold",
    "FoldScore",
    "Line",
    "Probe",
    "Retrieval",
    "Row",
    "Table",
    "compare",
    "fit_probe",
    "handmade_features",
    "leave_one_out",
    "pearson",
    "permuted_rows",
    "retrieve",
    "score_fold",
    "tables",
    "to_csv",
]

"""``seal-extract evaluate`` and its kinds: ``evaluate hest``, ``spots``, ``slides`` and ``robustness``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import add, comma_separated, encoder_request
from seal_extract.cli.terminal import echo, progress_line

if TYPE_CHECKING:
    from seal_extract.encoders.request import EncoderRequest
    from seal_extract.evaluate.table import Report

OTHERS = """\
other evaluations, each with its own --help:
  seal-extract evaluate hest FOLDER     the HEST-Benchmark, by its own protocol and with its own files
  seal-extract evaluate spots FOLDER    classes of spots, such as cortical layers, by a linear probe
  seal-extract evaluate slides OUT      labels of patients, such as a receptor, a grade or survival
  seal-extract evaluate robustness OUT  features of the same tissue by several scanners or stains
"""


def add_evaluate_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract evaluate``."""
    p.description = (
        "Predict gene expression from an encoder's embeddings by the held-out ridge, and retrieve spots by "
        "image. The tables compare permuted rows, handcrafted features and the encoder before alignment. The "
        "figures are not those of the HEST-Benchmark, which `evaluate hest` runs."
    )
    p.epilog, p.formatter_class = OTHERS, argparse.RawDescriptionHelpFormatter
    p.set_defaults(handler=run_evaluate)
    add(
        p,
        "--encoder",
        required=True,
        help="a name or a folder; {fold} in it stands for what is held out, with an encoder for each",
    )
    _add_base(p)
    p.add_argument(
        "--sections",
        required=True,
        type=Path,
        metavar="CONFIG.toml|FOLDER",
        help="the configuration of a training run, or a folder of sections, as of `seal-extract spots`",
    )
    p.add_argument(
        "--by",
        default="section",
        metavar="WHAT",
        help="what is held out in turn: section or patient; or random-spots for random splits over spots, as "
        "in SEAL's in-domain probe, which say nothing about a new section (default: section)",
    )
    p.add_argument(
        "--genes", type=int, default=250, metavar="N", help="number of most variable genes (default: 250)"
    )
    _add_out(p, "evaluation")
    add(p, "--mpp", default=0.5)
    add(p, "--patch-px", default=224)
    add(p, "--batch-size", default=64, help="patches per forward pass (default: 64)")
    p.add_argument("--seeds", type=int, default=10, metavar="N", help="permutations of rows (default: 10)")
    add(p, "--precision", "--device", "--offline")


def run_evaluate(args: argparse.Namespace) -> int:
    """Print the tables, and where they were written."""
    from seal_extract.evaluate.run import REPORT, EvaluateOptions, evaluate
    from seal_extract.train.formats import sections_of

    options = EvaluateOptions(args.by, args.genes, args.patch_px, args.mpp, args.batch_size, args.seeds)
    _check_out(args, REPORT)
    encoder, base = _encoders(args)
    sections = sections_of(args.sections)
    return _print(args, lambda show: evaluate(sections, encoder, base, options=options, log=show))


def add_hest_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract evaluate hest``."""
    p.description = (
        "Run the HEST-Benchmark by its own protocol: log1p of raw counts of the 50 genes of each task, 256 "
        "principal components, its ridge and its splits. Handcrafted features and permuted rows are compared."
    )
    p.set_defaults(handler=run_hest)
    p.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="the files of MahmoodLab/hest-bench as they lie on the Hub: TASK/patches, adata, splits and "
        "var_50genes.json; or the folder of one task",
    )
    add(p, "--encoder", required=True)
    _add_base(p)
    p.add_argument("--tasks", type=comma_separated, metavar="TASK[,TASK]", help="tasks to run (default: all)")
    _add_out(p, "hest", ", and embeddings, so that the same command continues")
    add(p, "--batch-size", "--precision", "--device", "--offline")


def run_hest(args: argparse.Namespace) -> int:
    """Print HEST's table and those of the splits, and where they were written."""
    from seal_extract.evaluate.hest import REPORT, evaluate_hest

    _check_out(args, REPORT)
    encoder, base = _encoders(args)
    return _print(
        args,
        lambda show: evaluate_hest(
            args.folder,
            encoder,
            base,
            args.out,
            tasks=args.tasks,
            batch_size=args.batch_size,
            overwrite=args.overwrite,
            log=show,
        ),
    )


def add_spot_classes_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract evaluate spots``."""
    p.description = (
        "Predict classes of spots from an encoder's embeddings by a linear probe, with "
        "donors left out in turn. Further tables are of random splits over spots, and of clusters of each "
        "section. Permuted labels, handcrafted features and the encoder before alignment are compared."
    )
    p.set_defaults(handler=run_spot_classes)
    p.add_argument(
        "source",
        type=Path,
        metavar="FOLDER|CONFIG.toml",
        help="a folder with NAME.h5ad and NAME.tif, or of HEST; or the configuration of a training run, with "
        "label_column in its [[data.sections]]",
    )
    p.add_argument("--label", metavar="COLUMN", help="of the AnnData's obs: the class of each spot")
    p.add_argument(
        "--donor", metavar="COLUMN", help="of the AnnData's obs (default: patient, or each section)"
    )
    p.add_argument(
        "--by", default="donor", metavar="WHAT", help="leave out donor or section (default: donor)"
    )
    add(p, "--encoder", required=True)
    _add_base(p)
    _add_out(p, "spot_classes")
    add(p, "--slide-mpp", help="µm/px of the images, if no file states it")
    add(p, "--mpp", default=0.5)
    add(p, "--patch-px", default=224)
    add(p, "--batch-size", default=64, help="patches per forward pass (default: 64)")
    add(p, "--precision", "--device", "--offline")


def run_spot_classes(args: argparse.Namespace) -> int:
    """Print the tables, and where they were written."""
    from seal_extract.evaluate.spot_classes import REPORT, evaluate_spots
    from seal_extract.train.formats import sections_of

    _check_out(args, REPORT)
    encoder, base = _encoders(args)
    columns = {"label_column": args.label, "patient_column": args.donor}
    sections = sections_of(args.source, mpp=args.slide_mpp, **columns)
    options = {k: getattr(args, k) for k in ("by", "patch_px", "mpp", "batch_size")}
    return _print(args, lambda show: evaluate_spots(sections, encoder, base, **options, log=show))


def add_labels_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract evaluate slides``."""
    p.description = (
        "Predict labels of patients from features of slides, by Patho-Bench's protocol: ABMIL, mean MIL and "
        "a linear probe for classes, Cox for survival. Encoders are compared on the same folds and "
        "patients, the first one again with permuted labels."
    )
    p.set_defaults(handler=run_labels)
    p.add_argument(
        "folders",
        type=Path,
        nargs="+",
        metavar="OUT",
        help="the -o of a finished run, of one or several encoders; or its folder features_NAME. Several may "
        "be given: the first encoder is compared with each of the others",
    )
    p.add_argument(
        "--labels",
        type=Path,
        required=True,
        metavar="TABLE",
        help="CSV or TSV of Patho-Bench or CLAM: slide_id, case_id (the patient), a label and perhaps "
        "fold_0, fold_1 and so on, or split, with train, val and test",
    )
    p.add_argument(
        "--label",
        default="label",
        metavar="COLUMN",
        help="the class, or the time until an event (default: label)",
    )
    p.add_argument(
        "--event", metavar="COLUMN", help="for survival: 1 for an event, 0 where the time is censored"
    )
    p.add_argument("--by", default="patient", help="a label is of a patient or of a slide (default: patient)")
    p.add_argument("--splits", type=Path, metavar="FOLDER", help="CLAM's folder of splits_0.csv and so on")
    p.add_argument(
        "--folds",
        type=int,
        default=5,
        metavar="N",
        help="folds of patients where none are given (default: 5)",
    )
    p.add_argument(
        "--heads",
        type=comma_separated,
        default=(),
        metavar="HEAD[,HEAD]",
        help="of abmil, mean-mil and linear-probe, or of cox-0.01, cox-0.02 and cox-0.07 (default: all)",
    )
    p.add_argument(
        "--patient-level",
        default="early",
        metavar="early|late",
        help="all patches of a patient are one bag, or embeddings of slides are averaged (default: early)",
    )
    p.add_argument("--seed", type=int, default=7, metavar="N", help="of folds and heads (default: 7)")
    _add_out(p, "slides-LABEL", ", and trained heads, so that the same command continues")
    add(p, "--device")


def run_labels(args: argparse.Namespace) -> int:
    """Print the tables, and where they were written."""
    from seal_extract.evaluate.labels import read_labels
    from seal_extract.evaluate.slides import evaluate_slides, names_of

    _check_out(args, names_of(args.label)[0])
    columns = {name: getattr(args, name) for name in ("event", "by", "splits", "folds", "seed")}
    labels = read_labels(args.labels, args.label, **columns)
    return _print(
        args,
        lambda show: evaluate_slides(
            labels,
            args.folders,
            args.out,
            heads=args.heads,
            fusion=args.patient_level,
            seed=args.seed,
            device=args.device,
            overwrite=args.overwrite,
            log=show,
        ),
    )


def add_robustness_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract evaluate robustness``."""
    p.description = (
        "Measure how far scanner and stain show in features of the same tissue: PLISM's cosine similarity "
        "and retrieval, RI, MaRI and CRoMa (extra robustness), and clusters of slides. All encoders of the "
        "run are compared."
    )
    p.set_defaults(handler=run_robustness)
    p.add_argument("folder", type=Path, metavar="OUT", help="the -o of a finished run, of all slides")
    p.add_argument(
        "--slides",
        type=Path,
        required=True,
        metavar="TABLE.csv",
        help="columns slide, specimen, scanner; optionally stain, and label: the biology that neighbours "
        "should share (default: the specimen)",
    )
    p.add_argument(
        "--patches", type=int, default=2000, metavar="N", help="of each slide at most (default: 2000)"
    )
    _add_out(p, "robustness", ", and robustness.png")


def run_robustness(args: argparse.Namespace) -> int:
    """Print the tables, and where they and the picture were written."""
    from seal_extract.evaluate.robustness import REPORT, evaluate_robustness, read_scans

    _check_out(args, REPORT)
    scans = read_scans(args.slides)
    return _print(args, lambda show: evaluate_robustness(args.folder, scans, patches=args.patches, log=show))


# --- what the kinds of evaluation share ---------------------------------------------------------------


def _add_base(p: argparse.ArgumentParser) -> None:
    p.add_argument("--base", metavar="NAME|FOLDER", help="the same encoder before alignment")


def _add_out(p: argparse.ArgumentParser, name: str, more: str = "") -> None:
    files = f"{name}.md, .csv and .json{more}"
    page = "evaluation.html, the page of all evaluations in it"
    p.add_argument("-o", "--out", type=Path, required=True, help=f"folder for {files}; and for {page}")
    p.add_argument("--overwrite", action="store_true", help="replace the files of another evaluation")


def _encoders(args: argparse.Namespace) -> tuple[EncoderRequest, EncoderRequest | None]:
    """The encoder, and the one that it is compared with."""
    base = None if args.base is None else encoder_request(args.base, args)
    return encoder_request(args.encoder, args), base


def _check_out(args: argparse.Namespace, name: str) -> None:
    """Refuse to replace files before anything is computed."""
    from seal_extract.evaluate.table import output_files
    from seal_extract.view.evaluation_page import check_page

    output_files(args.out, args.overwrite, name)
    check_page(args.out)


def _print(args: argparse.Namespace, evaluate: Callable[[Callable[[str], None]], Report]) -> int:
    """Evaluate, print the tables, and write them and the page of all evaluations in the folder."""
    from seal_extract.view.evaluation_page import write_evaluation_page

    show = progress_line(args.quiet)
    try:
        report = evaluate(show)
    finally:
        show("")
    echo(*report.to_markdown().split("\n"))
    report.about["command"] = args.typed
    written = report.write(args.out, overwrite=args.overwrite)
    for file in (*written, write_evaluation_page(args.out)):
        echo(f"-> {file}")
    return 0

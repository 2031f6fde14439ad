"""``seal-extract volume train``, ``predict`` and more: expression through a volume."""

from __future__ import annotations

import argparse
from pathlib import Path

from seal_extract.cli.options import add, comma_separated
from seal_extract.cli.terminal import echo, progress
from seal_extract.errors import UsageError

VOLUME = (
    "a stack with z (OME-TIFF, OME-Zarr), a folder of numbered planes, or a CSV or JSON file that lists "
    "sections with their transforms; see the guide"
)


def add_volume_options(p: argparse.ArgumentParser) -> None:
    """Add what ``seal-extract volume`` by itself shows: its commands."""
    p.description = "Gene expression through a volume, from its planes and one or two measured sections."
    p.add_argument(
        "what", choices=["register", "train", "predict", "evaluate"], help="each has a --help of its own"
    )


def add_volume_train_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract volume train``."""
    p.description = (
        "Train on 2D pairs, then on pairs of other volumes, then on the measured sections of the volume of "
        "interest. The same command resumes a run that was stopped."
    )
    p.set_defaults(handler=run_volume_train)
    p.add_argument("config", type=Path, metavar="CONFIG.toml", help="all options; the guide has an example")


def run_volume_train(args: argparse.Namespace) -> int:
    """Train and write the encoder's folder."""
    from seal_extract.volume.config import read_volume_config
    from seal_extract.volume.train import train_volume

    config = read_volume_config(args.config)
    trained = train_volume(config, log=progress(args))
    echo(f"use it with  seal-extract volume predict {config.voi.volume} --model {trained.path} -o OUT")
    return 0


def add_volume_predict_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract volume predict``."""
    p.description = (
        "Predict the expression of every plane: features and genes per plane as for slides, and one "
        "OME-Zarr of axes gene, z, y, x. The same command continues a run that was stopped."
    )
    p.set_defaults(handler=run_volume_predict)
    p.add_argument("volume", type=Path, metavar="VOLUME", help=VOLUME)
    p.add_argument("--model", type=Path, required=True, help="the folder that `volume train` wrote")
    p.add_argument(
        "-o", "--out", type=Path, default=Path("out"), help="folder for the results (default: out)"
    )
    p.add_argument("--genes", metavar="A,B", help="write these genes (default: the whole panel)")
    p.add_argument("--spacing-um", type=float, metavar="UM", help="µm between planes, if nothing states it")
    add(p, "--slide-mpp", help="µm/px of the planes, if nothing states it")
    p.add_argument(
        "--window", metavar="LOW,HIGH", help="values for black and white of a grey stack of more than 8 bits"
    )
    p.add_argument(
        "--min-tissue",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="least tissue in a patch (default: 0.5)",
    )
    p.add_argument("--all-tissue", action="store_true", help="take every patch; for volumes that are not H&E")
    p.add_argument(
        "--allow-upsampling",
        action="store_true",
        help="permit planes that are coarser than the model's patches",
    )
    p.add_argument(
        "--domains", type=int, default=0, metavar="N", help="also find N spatial domains over all planes"
    )
    add(p, "--device")
    p.add_argument("--overwrite", action="store_true", help="replace files that another request made")


def run_volume_predict(args: argparse.Namespace) -> int:
    """Print a line for each plane, and where the volume was written."""
    from seal_extract.volume.model import load_volume_encoder
    from seal_extract.volume.predict import predict_volume
    from seal_extract.volume.volume import open_volume

    window = None if args.window is None else _window(args.window)
    volume = open_volume(args.volume, spacing_um=args.spacing_um, mpp=args.slide_mpp, window=window)
    model = load_volume_encoder(args.model, device=args.device)
    echo(volume)
    path = predict_volume(
        volume,
        model,
        args.out,
        genes=None if args.genes is None else comma_separated(args.genes),
        min_tissue=args.min_tissue,
        all_tissue=args.all_tissue,
        allow_upsampling=args.allow_upsampling,
        domains=args.domains,
        overwrite=args.overwrite,
        log=progress(args),
    )
    echo(f"-> {path}")
    return 0


def add_volume_register_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract volume register``."""
    p.description = (
        "Lay serial sections on each other by their tissue and stain, and write the JSON file of a volume "
        "and a picture by which to check it."
    )
    p.set_defaults(handler=run_volume_register)
    p.add_argument("slides", nargs="+", metavar="SLIDE", help="sections, in the order of their depth")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="VOLUME.json", help="file to write")
    p.add_argument("--spacing-um", type=float, required=True, metavar="UM", help="µm between sections")
    add(p, "--slide-mpp")
    p.add_argument("--overwrite", action="store_true", help="replace the file")


def run_volume_register(args: argparse.Namespace) -> int:
    """Print a line for each section, and where the volume was written."""
    from seal_extract.slides.entry import SlideEntry
    from seal_extract.volume.register import register_sections

    entries = [SlideEntry.of(slide) for slide in args.slides]
    register_sections(
        entries, args.out, args.spacing_um, mpp=args.slide_mpp, overwrite=args.overwrite, log=echo
    )
    echo(f"-> {args.out}; look at {args.out.with_suffix('.jpg')}")
    return 0


def add_volume_evaluate_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract volume evaluate``."""
    p.description = (
        "Hold out measured sections in turn, train on the measured ones above and below, and compare the "
        "prediction with one plane, with interpolation of the two, and with permuted rows."
    )
    p.set_defaults(handler=run_volume_evaluate)
    p.add_argument("config", type=Path, metavar="CONFIG.toml", help="of a training; voi lists all sections")
    p.add_argument("--hold-out", metavar="NAME[,NAME]", default="", help="sections (default: all inner ones)")
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for evaluation.md, .csv and .json")
    p.add_argument("--overwrite", action="store_true", help="replace the report of another evaluation")


def run_volume_evaluate(args: argparse.Namespace) -> int:
    """Print the table."""
    from seal_extract.evaluate.volume import REPORT, evaluate_volume
    from seal_extract.volume.config import read_volume_config

    config, names = read_volume_config(args.config), comma_separated(args.hold_out)
    evaluate_volume(config, args.out, names, overwrite=args.overwrite, log=progress(args))
    table = args.out / f"{REPORT}.md"
    echo(*table.read_text(encoding="utf-8").splitlines(), f"-> {table}")
    return 0


def _window(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError as exc:
        raise UsageError(f"--window is {text!r}; allowed: LOW,HIGH, for example 1000,4000") from exc
    return low, high

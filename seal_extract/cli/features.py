"""Feature files given to a command, and their gene decoder; ``seal-extract verify`` and ``export``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seal_extract.cli.options import add
from seal_extract.cli.terminal import echo, exit_status, fail
from seal_extract.errors import OutputError, SealExtractError, UsageError

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder

Damaged = dict[Path, SealExtractError]


def add_features(p: argparse.ArgumentParser, nargs: str = "+") -> None:
    """Add the feature files, and the options that find their slides and their gene decoder."""
    p.add_argument(
        "features",
        nargs=nargs,
        type=Path,
        metavar="OUT|SLIDE.h5",
        help="the -o of a finished run, or feature files",
    )
    add(p, "--encoder", help="encoder of these features (default: the one that the files name)")
    add(p, "--checkpoint", help="its weights on this disk")
    add(p, "--offline", "--slides", "--panel")


def read_given(paths: Sequence[Path], encoder: str | None) -> tuple[list[SlideFeatures], Damaged]:
    """The feature files given and those in the folders given; damaged ones are reported.

    Raises:
        UsageError: no file is given, or the files are of several encoders.
        OutputError: no file can be read.
    """
    from seal_extract.features.store import list_features, read_features

    if not paths:
        raise UsageError("type the -o of a finished run, or feature files")
    slides: list[SlideFeatures] = []
    damaged: Damaged = {}
    for path in paths:
        try:
            if path.is_dir():
                listed, bad = list_features(path)
                slides, damaged = slides + listed, damaged | bad
            else:
                slides.append(read_features(path))
        except SealExtractError as exc:
            if len(paths) == 1:
                raise
            damaged[path] = exc
    _report(damaged)
    if not slides:
        raise OutputError("none of these files can be read; give the -o of a finished run")
    names = sorted({slide.provenance["encoder"]["name"] for slide in slides})
    if len(names) == 1:
        return slides, damaged
    wanted = [slide for slide in slides if slide.provenance["encoder"]["name"] == encoder]
    if not wanted:
        raise UsageError(f"these are features of {', '.join(names)}; choose one with --encoder")
    return wanted, damaged


def keep_sound(slides: Sequence[SlideFeatures], damaged: Damaged) -> tuple[list[SlideFeatures], Damaged]:
    """The files whose rows are all present and finite; the others are reported and join the damaged ones.

    Raises:
        OutputError: no file is left.
    """
    from seal_extract.genes.index import sound_slides

    sound, bad = sound_slides(slides)
    _report(bad)
    if not sound:
        raise OutputError("none of these feature files is whole; encode these slides again with --overwrite")
    return sound, damaged | bad


def _report(damaged: Mapping[Path, SealExtractError]) -> None:
    for error in damaged.values():
        fail(str(error), 1)


def decoder_for(slides: Sequence[SlideFeatures], args: argparse.Namespace) -> GeneDecoder:
    """The decoder of the one encoder that made all of these features, found by the options.

    Raises:
        SealExtractError: see `decoder_of` and `check_one_encoder`.
    """
    from seal_extract.genes.decoder import decoder_of
    from seal_extract.genes.index import check_one_encoder

    check_one_encoder(slides)
    return decoder_of(
        slides[0].provenance,
        encoder=args.encoder,
        checkpoint=args.checkpoint,
        panel=given_panel(args),
        offline=args.offline,
    )


def given_panel(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The gene names of ``--panel``."""
    from seal_extract.genes.gene_lists import read_panel

    return None if args.panel is None else read_panel(args.panel)


def check_one_file_each(slides: Sequence[SlideFeatures], path_of: Callable[[SlideFeatures], Path]) -> None:
    """Refuse two slides that would be written to one file.

    Raises:
        UsageError: there are two.
    """
    seen: dict[Path, Path] = {}
    for features in slides:
        path = path_of(features)
        if path in seen:
            raise UsageError(
                f"{seen[path]} and {features.path} would both become {path.name}; give them in two commands, "
                "each with its own -o"
            )
        seen[path] = features.path


def each_slide(slides: Sequence[SlideFeatures], damaged: Damaged, do: Callable[[SlideFeatures], str]) -> int:
    """Do something with each slide and print one line for each; returns the exit status."""
    failed = len(damaged)
    for slide in slides:
        try:
            echo(f"{slide.path.stem}: {do(slide)}")
        except SealExtractError as exc:
            failed += 1
            fail(f"{slide.path.stem}: {exc}", 1)
    return exit_status(failed, len(slides) + len(damaged), "slides")


# --- verify and export ---------------------------------------------------------------------------------


def add_verify_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract verify``."""
    p.description = (
        "Read every file of a folder as another tool does, or compare it with what a slide encoder takes, "
        "and print its problems."
    )
    p.set_defaults(handler=run_verify)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the folder that you would give to that tool")
    p.add_argument(
        "--for",
        required=True,
        dest="consumer",
        metavar="TOOL",
        help="clam, trident, patho-bench, stamp or mil-lab; or the slide encoder titan, prism, prism2, "
        "gigapath, gigapath-flash, moozy, feather, chief, tangle, madeleine or care",
    )


def run_verify(args: argparse.Namespace) -> int:
    """Print one line per problem; the exit status is 1 if a file has one, 2 if there is no file."""
    from seal_extract.features.fit import rows_for
    from seal_extract.features.verify import CONSUMERS, files_for, verify

    files, consumer = files_for(args.folder, args.consumer), args.consumer
    problems = verify(args.folder, consumer)
    for problem in problems:
        echo(problem)
    short = {f.path for f in problems if not f.is_warning}
    if short:
        said = f"{len(short)} of {len(files)} files are not as {consumer} expects"
        commands = [] if consumer in CONSUMERS else [row.command for row in rows_for(consumer)]
        return fail(said + (f"; make features for it with: {' or: '.join(commands)}" if commands else ""), 1)
    echo(f"{len(files)} of {len(files)} files are as {consumer} expects")
    return 0


def add_export_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract export``."""
    p.description = "Convert the features of a finished run to another layout, without encoding again."
    p.set_defaults(handler=run_export)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="the -o of a finished run, or a part of it")
    p.add_argument(
        "--layout",
        required=True,
        metavar="NAME",
        help="trident, clam, stamp, flat, anndata or spatialdata",
    )
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the copies")
    p.add_argument("--overwrite", action="store_true", help="replace files that were made from others")
    picture = "the folder of the slides, if they have moved; anndata and spatialdata hold a picture of one"
    add(p, "--slides", help=picture)


def run_export(args: argparse.Namespace) -> int:
    """Print one line per feature file; the exit status is 1 if one could not be exported."""
    from seal_extract.features.export import export

    failed = total = 0
    for exported in export(args.folder, args.layout, args.out, overwrite=args.overwrite, slides=args.slides):
        total += 1
        if exported.error is None:
            echo(exported)
        else:
            failed += 1
            fail(str(exported), 1)
    return exit_status(failed, total, "files")

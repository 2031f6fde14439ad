"""``seal-extract view`` and ``report``: a finished run in the browser, or as HTML files to send."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from seal_extract.cli.features import (
    add_features,
    check_one_file_each,
    decoder_for,
    each_slide,
    given_panel,
    keep_sound,
    read_given,
)
from seal_extract.cli.options import add, comma_separated
from seal_extract.cli.terminal import echo, warn
from seal_extract.errors import EncoderError, UsageError

if TYPE_CHECKING:
    from seal_extract.features.store import SlideFeatures
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.view.collection import Collection


def add_view_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract view``."""
    p.description = (
        "Look at a finished run in the browser: slides, patches, embeddings, clusters, predicted "
        "genes, attention; of a predicted volume, its planes in depth and a box that can be cut. The page "
        "is served to this machine only, at the printed address with its token, and needs no network."
    )
    p.set_defaults(handler=run_view)
    p.add_argument("out", type=Path, metavar="OUT", help="the -o of a finished run, or a part of it")
    p.add_argument(
        "--encoder",
        metavar="NAME|FOLDER",
        help="the encoder whose features to show, where there are several; a folder, if it has moved",
    )
    add(p, "--slides")
    genes = p.add_argument_group("genes")
    add(genes, "--panel")
    genes.add_argument("--signatures", type=Path, metavar="FILE.gmt", help="gene sets to choose from by name")
    add(genes, "--checkpoint", help="weights of the encoder on this disk")
    add(genes, "--offline")
    p.add_argument("--port", type=int, default=0, metavar="N", help="default: a free one")
    p.add_argument("--no-browser", action="store_true", help="print the address and open nothing")


def run_view(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from seal_extract.genes.gene_lists import read_gmt
    from seal_extract.view.collection import Collection
    from seal_extract.view.gallery import Gallery
    from seal_extract.view.gene_maps import GeneMaps
    from seal_extract.view.viewer import listen, make_server

    collection = Collection.find(args.out, _name(args.encoder), args.slides)
    provenance = next(s.provenance for s in collection.slides if s.provenance)
    panel = given_panel(args)
    signatures = None if args.signatures is None else read_gmt(args.signatures)
    gallery = Gallery(collection, GeneMaps(lambda: _decoder_of_run(args, provenance, panel), signatures))
    token = secrets.token_urlsafe(24)
    with listen(args.port) as sock, TemporaryDirectory(prefix="seal-extract-") as private:
        address = f"http://127.0.0.1:{sock.getsockname()[1]}/?token={token}"
        _warn_of_moved(collection)
        server = make_server(gallery, sock, token, debug=args.debug)
        with suppress(KeyboardInterrupt):
            _announce(address, len(collection.slides), args, Path(private))
            server.run(sockets=[sock])
    echo("stopped")
    return 0


def _warn_of_moved(collection: Collection) -> None:
    moved = sum(s.problem is not None for s in collection.slides if s.features is not None)
    if moved:
        slides = "1 slide is" if moved == 1 else f"{moved} slides are"
        warn(f"{slides} not where the features say; type --slides FOLDER")


def _announce(address: str, slides: int, args: argparse.Namespace, private: Path) -> None:
    echo(f"{slides} slide{'s' * (slides != 1)} of {args.out} at {address} (Ctrl-C ends it)")
    if not args.no_browser:
        import webbrowser

        # other users can see the arguments of a command, so the token is not one
        page = private / "view.html"
        page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(page.as_uri())


def _name(encoder: str | None) -> str | None:
    """The name of an encoder given by name or as a folder."""
    if encoder is None or not Path(encoder).is_dir():
        return encoder
    from seal_extract.encoders.folder import CONFIG, read_config

    return read_config(Path(encoder) / CONFIG).name


def _decoder_of_run(
    args: argparse.Namespace, provenance: dict[str, Any], panel: tuple[str, ...] | None
) -> GeneDecoder:
    from seal_extract.genes.decoder import decoder_of

    return decoder_of(
        provenance, encoder=args.encoder, checkpoint=args.checkpoint, panel=panel, offline=args.offline
    )


# --- report -------------------------------------------------------------------------------------------


def add_report_options(p: argparse.ArgumentParser) -> None:
    """Add the options of ``seal-extract report``."""
    p.description = (
        "Write each slide with its embedding, clusters, predicted genes and attention as one "
        "HTML file that opens without a server and without a network. Of the folder of a predicted volume, "
        "write one file for the volume."
    )
    p.set_defaults(handler=run_report)
    add_features(p)
    p.add_argument("-o", "--out", type=Path, help="folder (default: reports_ENCODER beside the features)")
    genes = p.add_argument_group("genes")
    which = genes.add_mutually_exclusive_group()
    which.add_argument("--genes", metavar="A,B", help="default: the 24 whose prediction varies most")
    which.add_argument("--no-genes", action="store_true", help="no genes; the decoder is not loaded")
    add(genes, "--signature")
    p.add_argument(
        "--max-px", type=int, default=3000, metavar="N", help="longest side of the picture (default: 3000)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that are not reports of this tool")


def run_report(args: argparse.Namespace) -> int:
    """Print one line per slide; the exit status is 1 if a slide failed."""
    from seal_extract.features.store import open_origin
    from seal_extract.genes.gene_lists import read_signature
    from seal_extract.genes.index import check_one_encoder
    from seal_extract.view.report import check_side, report_path, write_slide_report

    check_side(args.max_px)
    if (path := _volume_report(args)) is not None:
        echo(f"{path.stat().st_size / 1e6:.1f} MB -> {path}")
        return 0
    slides, damaged = read_given(args.features, args.encoder)
    check_one_encoder(slides)
    check_one_file_each(slides, lambda slide: report_path(slide, args.out))
    slides, damaged = keep_sound(slides, damaged)
    decoder = _decoder_of_slides(args, slides)
    genes = comma_separated(args.genes) if args.genes else None
    signatures = [read_signature(text) for text in args.signature]
    if decoder is not None:  # genes that no slide can have are reported once
        if genes:
            decoder.columns(genes)
        for signature in signatures:
            if len(signature.known_to(decoder)[0]) < len(signature.weights):
                warn(signature.coverage(decoder))

    def write_one(features: SlideFeatures) -> str:
        with closing(open_origin(features, args.slides)) as slide:
            path = write_slide_report(
                features,
                report_path(features, args.out),
                slide=slide,
                decoder=decoder,
                genes=genes,
                signatures=signatures,
                max_px=args.max_px,
                overwrite=args.overwrite,
            )
        return f"{len(features.grid):,} patches, {path.stat().st_size / 1e6:.1f} MB -> {path}"

    return each_slide(slides, damaged, write_one)


def _volume_report(args: argparse.Namespace) -> Path | None:
    """The page of a volume, if its OME-Zarr lies in the one folder that is given."""
    from seal_extract.view.collection import Collection
    from seal_extract.view.volume_report import write_volume_report

    folder, *more = args.features
    if more or not any(folder.glob("*.ome.zarr")):
        return None
    if args.signature or args.panel:
        raise UsageError(
            "the page of a volume has the genes that were predicted; --signature and --panel are for slides: "
            f"give the folder of their features below {folder}"
        )
    collection = Collection.find(folder, _name(args.encoder), args.slides)
    path = (args.out or folder) / f"{collection.encoder}.html"
    genes = [] if args.no_genes else comma_separated(args.genes) if args.genes else None
    written = write_volume_report(collection, path, genes=genes, max_px=args.max_px, overwrite=args.overwrite)
    if written is not None:
        _warn_of_moved(collection)
    return written


def _decoder_of_slides(args: argparse.Namespace, slides: Sequence[SlideFeatures]) -> GeneDecoder | None:
    """The decoder; None, with a warning, if there is none and no gene was asked for."""
    from seal_extract.encoders.registry import list_encoders

    asked, name = bool(args.genes or args.signature or args.panel), slides[0].provenance["encoder"]["name"]
    if args.no_genes and asked:
        raise UsageError(
            "--no-genes leaves out the decoder, which --signature and --panel need; type one of them"
        )
    if args.no_genes:
        return None
    published = {row.name: row.published for row in list_encoders()}.get(name)
    if not asked and published is not None and not published.decoder:  # avoids loading gigabytes
        warn(f"{name} has no expression decoder; the pages have no genes")
        return None
    try:
        return decoder_for(slides, args)
    except EncoderError as exc:
        if asked or type(exc) is not EncoderError:  # a damaged file or a network error
            raise
        warn(f"{exc}; the pages have no genes")
        return None

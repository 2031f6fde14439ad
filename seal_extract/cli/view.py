"""``seal-extract view``: look at a finished run in the browser."""

from __future__ import annotations

import argparse
import secrets
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from seal_extract.cli.features import given_panel
from seal_extract.cli.options import Parser, add, add_common
from seal_extract.cli.terminal import echo, warn

if TYPE_CHECKING:
    from seal_extract.genes.decoder import GeneDecoder
    from seal_extract.genes.gene_lists import Signature


def view_parser() -> argparse.ArgumentParser:
    """The parser of ``seal-extract view``."""
    p = Parser(
        prog="seal-extract view",
        description="Look at a finished run in the browser: slides, patches, embeddings, clusters, predicted "
        "genes, attention. The page is served to this machine only, at the printed address with its "
        "token, and needs no network.",
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
    add_common(p)
    return p


def run_view(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    from seal_extract.view.collection import Collection
    from seal_extract.view.gallery import Gallery
    from seal_extract.view.gene_maps import GeneMaps
    from seal_extract.view.viewer import listen, make_server

    collection = Collection.find(args.out, _name(args.encoder), args.slides)
    provenance = next(s.provenance for s in collection.slides if s.provenance)
    panel, signatures = given_panel(args), _signatures(args)
    gallery = Gallery(collection, GeneMaps(lambda: _decoder(args, provenance, panel), signatures))
    token = secrets.token_urlsafe(24)
    with listen(args.port) as sock, TemporaryDirectory(prefix="seal-extract-") as private:
        address = f"http://127.0.0.1:{sock.getsockname()[1]}/?token={token}"
        moved = sum(s.problem is not None for s in collection.slides if s.features is not None)
        if moved:
            slides = "1 slide is" if moved == 1 else f"{moved} slides are"
            warn(f"{slides} not where the features say; type --slides FOLDER")
        server = make_server(gallery, sock, token, debug=args.debug)
        with suppress(KeyboardInterrupt):
            _announce(address, len(collection.slides), args, Path(private))
            server.run(sockets=[sock])
    echo("stopped")
    return 0


def _announce(address: str, slides: int, args: argparse.Namespace, private: Path) -> None:
    echo(f"{slides} slide{'s' * (slides != 1)} of {args.out} at {address} (Ctrl-C ends it)")
    if not args.no_browser:
        import webbrowser

        page = (
            private / "view.html"
        )  # other users can see the arguments of a command, so the token is not one
        page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(page.as_uri())


def _name(encoder: str | None) -> str | None:
    """The name of an encoder given by name or as a folder."""
    if encoder is None or not Path(encoder).is_dir():
        return encoder
    from seal_extract.encoders.folder import CONFIG, read_config

    return read_config(Path(encoder) / CONFIG).name


def _signatures(args: argparse.Namespace) -> dict[str, Signature] | None:
    if args.signatures is None:
        return None
    from seal_extract.genes.gene_lists import read_gmt

    return read_gmt(args.signatures)


def _decoder(
    args: argparse.Namespace, provenance: dict[str, Any], panel: tuple[str, ...] | None
) -> GeneDecoder:
    from seal_extract.genes.decoder import decoder_of

    return decoder_of(
        provenance, encoder=args.encoder, checkpoint=args.checkpoint, panel=panel, offline=args.offline
    )

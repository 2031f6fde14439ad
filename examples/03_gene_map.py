"""Map the predicted expression of genes over a section, and hold it against what was measured there.

python examples/03_gene_map.py her2st/ C2 FASN,IGLC2 -o maps --encoder folds/C2

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021).
4.0). An encoder that saw the section in training fits it too well; one that did not is made by
``06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2``. What is drawn is the decoder's prediction as it is.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from seal_extract import ExtractOptions, extract, load_encoder, open_slide
from seal_extract.genes.decoder import load_decoder
from seal_extract.genes.predict import predict_genes
from seal_extract.train.formats import load_sections
from seal_extract.train.pairs import make_pairs
from seal_extract.view.heatmap import draw_heatmap

PATCH_PX, MPP = 224, 0.5  # as the encoder was trained


def main(her2st: Path, section: str, genes: list[str], encoder: str, out: Path) -> dict[str, float]:
    """Draw ``out/SECTION_GENE.png``; return Pearson's r of each gene over the spots."""
    (measured,) = load_sections([{"kind": "st-tables", "folder": str(her2st), "names": [section]}])
    decoder, loaded = load_decoder(encoder), load_encoder(encoder)
    columns = decoder.columns(genes)
    options = ExtractOptions(
        patch_px=PATCH_PX, mpp=MPP, overlap_px=PATCH_PX // 2, slide_mpp=measured.mpp, allow_upsampling=True
    )
    features = extract(measured.slide, loaded, out, options=options)

    pairs = make_pairs([measured], genes, PATCH_PX, MPP)  # a patch on each spot, and its measured expression
    at_spots = np.concatenate([loaded.encode(batch).cpu().numpy() for batch in _batches(pairs.patches)])
    predicted, truth = decoder.predict(at_spots, columns), pairs.expression
    maps = predict_genes(features, decoder, columns)

    found = {}
    with open_slide(measured.slide, mpp=measured.mpp) as slide:
        for i, gene in enumerate(genes):
            found[gene] = float(np.corrcoef(predicted[:, i], truth[:, i])[0, 1])
            title = f"{gene}   r = {found[gene]:.2f} with {len(pairs)} measured spots"
            unit = "predicted log1p expression"
            draw_heatmap(slide, features.grid, maps[:, i], out / f"{section}_{gene}.png", title, unit=unit)
            print(f"{section} {gene}: r = {found[gene]:.3f} over {len(pairs)} spots")
    return found


def _batches(patches: NDArray[np.uint8], size: int = 64) -> Iterator[torch.Tensor]:
    for start in range(0, len(patches), size):
        yield torch.from_numpy(patches[start : start + size])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("her2st", type=Path)
    parser.add_argument("section")
    parser.add_argument("genes", type=lambda text: text.split(","))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--encoder", default="seal-tiny")
    args = parser.parse_args()
    main(args.her2st, args.section, args.genes, args.encoder, args.out)

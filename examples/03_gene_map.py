"""Map the predicted expression of genes over a section, and hold it against what was measured there.

python examples/03_gene_map.py her2st/ C2 EPCAM,IGLC2 folds/C2 maps

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021). An
encoder that saw the section in training fits it too well; one that did not is made by ``06_seal_tiny.py
her2st/ -o folds/C2 --hold-out C2``. What is drawn is the decoder's prediction as it is.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from seal_extract import ExtractOptions, extract, load_encoder, open_slide
from seal_extract.genes.decoder import load_decoder
from seal_extract.genes.predict import predict_genes
from seal_extract.train.formats import load_sections
from seal_extract.train.pairs import make_pairs
from seal_extract.view.pictures import draw_heatmap

PATCH_PX, MPP = 224, 0.5  # as the encoder was trained


def main(
    her2st: str, section: str, named: str, encoder: str = "seal-tiny", out: str = "maps"
) -> dict[str, float]:
    """Draw ``out/SECTION_GENE.png``; return Pearson's r of each gene over the spots."""
    genes, decoder, loaded = named.split(","), load_decoder(encoder), load_encoder(encoder)
    columns = decoder.columns(genes)
    (measured,) = load_sections([{"kind": "st-tables", "folder": her2st, "names": [section]}])
    options = ExtractOptions(
        patch_px=PATCH_PX, mpp=MPP, overlap_px=PATCH_PX // 2, override_mpp=measured.mpp, allow_upsampling=True
    )
    features = extract(measured.slide, loaded, out, options=options)
    maps = predict_genes(features, decoder, columns)  # float32 [N, genes]

    pairs = make_pairs([measured], genes, PATCH_PX, MPP)  # a patch on each spot, and its measured expression
    at_spots = torch.cat(
        [loaded.encode(patches) for patches in torch.split(torch.from_numpy(pairs.patches), 64)]
    )
    predicted = decoder.predict(at_spots.cpu().numpy(), columns)

    found = {}
    with open_slide(measured.slide, mpp=measured.mpp) as slide:
        for i, gene in enumerate(genes):
            found[gene] = float(np.corrcoef(predicted[:, i], pairs.expression[:, i])[0, 1])
            title = f"{gene}   r = {found[gene]:.2f} with {len(pairs)} measured spots"
            path = Path(out) / f"{section}_{gene}.png"
            unit, name = "predicted log1p expression", loaded.spec.name
            draw_heatmap(slide, features.grid, maps[:, i], path, title, unit=unit, encoder=name)
            print(f"{section} {gene}: r = {found[gene]:.3f} over {len(pairs)} spots -> {path}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)

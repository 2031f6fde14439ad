"""Find the patches of a section where a gene programme is high, and look up what was measured there.

python examples/04_search_by_genes.py her2st/ C2 IGKC,IGLC2,IGHG3 folds/C2 found

Data and encoder as in ``03_gene_map.py``. The last line says how high the programme was measured in the spots
next to the patches that were found: 50 is what patches drawn by lot would give, 100 the highest spot.
"""

import sys
from pathlib import Path

import numpy as np

from seal_extract import ExtractOptions, extract, load_encoder
from seal_extract.genes.decoder import load_decoder
from seal_extract.genes.gene_lists import read_signature
from seal_extract.genes.search import search_expression
from seal_extract.train.formats import load_sections
from seal_extract.view.pictures import draw_contact_sheet

PATCH_PX, MPP = 224, 0.5  # as the encoder was trained
NEAR_UM = 100  # from the middle of a patch to that of a spot; spots are 200 µm apart


def main(her2st: str, section: str, programme: str, encoder: str = "seal-tiny", out: str = "found") -> float:
    """Draw ``out/contact_sheet.png``; return the mean percentile of the spots beside the patches found."""
    signature, decoder = read_signature(programme), load_decoder(encoder)
    signature.known_to(decoder)
    (measured,) = load_sections([{"kind": "st-tables", "folder": her2st, "names": [section]}])
    options = ExtractOptions(patch_px=PATCH_PX, mpp=MPP, override_mpp=measured.mpp, allow_upsampling=True)
    features = extract(measured.slide, load_encoder(encoder), out, options=options)

    found = search_expression([features], decoder, signature, 24)
    draw_contact_sheet(found, Path(out) / "contact_sheet.png", f"{section}: highest {programme}")

    values = measured.log1p(list(signature.weights))
    score = ((values - values.mean(0)) / values.std(0)).mean(1)
    percentile = 100 * score.argsort().argsort() / (len(score) - 1)
    middles = features.grid.xy_l0[[one.row for one in found]] + features.grid.patch_size_l0 / 2
    away_um = np.linalg.norm(middles[:, None] - measured.xy_l0[None], axis=2) * float(measured.mpp or 1)
    spots = away_um.argmin(1)[away_um.min(1) <= NEAR_UM]
    mean = float(percentile[spots].mean())
    print(f"{section}: {len(found)} patches, {len(spots)} with a spot beside; measured percentile {mean:.0f}")
    return mean


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)

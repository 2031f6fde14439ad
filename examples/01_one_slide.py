"""One slide, stage by stage: each gives a record that one can print and look at.

Run it: python examples/01_one_slide.py slide.svs seal-conch out
"""

import sys

from seal_extract import extract, find_tissue, load_encoder, make_grid, open_slide


def main(slide_path: str, encoder_name: str, out: str) -> None:
    """Look at every stage of a slide, then let `extract` do them all."""
    with open_slide(slide_path) as slide:
        print(slide)
        mask = find_tissue(slide)
        print(mask)
        grid = make_grid(slide, mask, patch_px=224, mpp=0.5)
        print(grid)

    encoder = load_encoder(encoder_name)
    print(encoder)

    result = extract(slide_path, encoder, out)
    print(result)
    features = result.features
    print(f"features {features.dtype} {features.shape}, the first row begins {features[0, :4]}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)

"""Make the bundled encoder: pretrain a small ViT on tissue without labels, then finetune it by SEAL.

python examples/06_seal_tiny.py her2st/ -o weights/seal-tiny         # on all four sections
python examples/06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2    # nothing of C2 is seen

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021,
CC BY 4.0). Beside the encoder stays its base, before alignment, as ``NAME-base``.
"""

import argparse
from pathlib import Path

from seal_extract.train.config import DataOptions, OmicsOptions, TrainConfig
from seal_extract.train.formats import load_sections
from seal_extract.train.loop import LoopOptions
from seal_extract.train.lora import LoraOptions
from seal_extract.train.pretrain import pretrain
from seal_extract.train.run import run
from seal_extract.train.seal import SealOptions

SECTIONS = ("C2", "C3", "C4", "C5")
CARD = """\
## Data

Four neighbouring sections of one HER2-positive breast cancer with their H&E images: patient C, sections C2
to C5 of her2st. Andersson et al., Spatial deconvolution of HER2-positive breast cancer delineates
tumor-associated cell type interactions, Nature Communications 12, 6012 (2021), doi
10.1038/s41467-021-26271-2; CC BY 4.0. The images are at 0.687 µm/px and were enlarged to 0.5.

The base was pretrained on windows of their tissue without labels: windows of one place are told from those
of others, and colours and edges of a window are foretold from half of it.

## Limits

For trying the tool and for tests. It has seen one tumour of one patient, one laboratory's stain and one
scanner; nothing is known of how it does on others. Do not draw conclusions about patients from it.
"""


def finetuning(base: Path, out: Path, epochs: int) -> TrainConfig:
    """SEAL's two stages, on a small scale."""
    return TrainConfig(
        name="seal-tiny",
        encoder=str(base),
        out=str(out),
        batch_size=128,
        licence="CC-BY-4.0",
        card=CARD,
        data=DataOptions(sections=(), genes=500),
        omics=OmicsOptions(hidden=(256, 128), epochs=2 * epochs, lr=1e-3),
        seal=SealOptions(lora=LoraOptions(blocks=2)),
        loop=LoopOptions(epochs=epochs, lr=1e-3),
    )


def main() -> None:
    """Pretrain, finetune, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("her2st", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", choices=SECTIONS)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--epochs", type=int, default=20)
    args = parser.parse_args()
    names = [name for name in SECTIONS if name != args.hold_out]
    sections = load_sections([{"kind": "st-tables", "folder": str(args.her2st), "names": names}])
    base = args.out.with_name(args.out.name + "-base")
    if not (base / "config.json").exists():
        pretrain(sections, args.steps, tell=print).save_pretrained(base)
    run(finetuning(base, args.out, args.epochs), sections=sections, tell=print)


if __name__ == "__main__":
    main()

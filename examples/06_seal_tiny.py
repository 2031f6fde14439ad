"""Make the bundled encoder: pretrain a small ViT on tissue without labels, then finetune it by SEAL.

python examples/06_seal_tiny.py her2st/ -o weights/seal-tiny         # on all four sections
python examples/06_seal_tiny.py her2st/ -o folds/C2 --hold-out C2    # nothing of C2 is seen

``her2st/`` holds counts, spots and images of https://github.com/almaan/her2st (Andersson et al. 2021,
CC BY 4.0). Beside the encoder stays its base, before alignment, as ``NAME-base``.
"""

import argparse
from pathlib import Path

from seal_extract.train.config import (
    DataOptions,
    LoopOptions,
    LoraOptions,
    OmicsOptions,
    SealOptions,
    TrainConfig,
)
from seal_extract.train.formats import load_sections
from seal_extract.train.pretrain import pretrain
from seal_extract.train.run import run

SECTIONS = ("C2", "C3", "C4", "C5")
CARD = Path(__file__).parents[1] / "weights" / "seal-tiny.md"  # data, figures, limits


def main(her2st: Path, out: Path, hold_out: str | None = None, steps: int = 350, epochs: int = 12) -> None:
    """Pretrain, finetune on a small scale, write."""
    names = [name for name in SECTIONS if name != hold_out]
    sections = load_sections([{"kind": "st-tables", "folder": str(her2st), "names": names}])
    base = out.with_name(out.name + "-base")
    if not (base / "config.json").exists():
        pretrain(sections, steps, tell=print).save_pretrained(base)
    config = TrainConfig(
        name="seal-tiny",
        encoder=str(base),
        out=str(out),
        batch_size=64,
        licence="CC-BY-4.0",
        card=CARD.read_text(encoding="utf-8"),
        data=DataOptions(sections=(), genes=500),
        omics=OmicsOptions(hidden=(256, 128), epochs=40, lr=1e-3),
        seal=SealOptions(alignment=0.5, prediction=2.0, lora=LoraOptions(blocks=6)),
        loop=LoopOptions(epochs=epochs, lr=4e-3),
    )
    run(config, sections=sections, tell=print)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("her2st", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--hold-out", choices=SECTIONS)
    args = parser.parse_args()
    main(args.her2st, args.out, args.hold_out)

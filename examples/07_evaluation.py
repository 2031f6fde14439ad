"""Evaluate an encoder where the truth is known, and look at everything on one page.

python examples/07_evaluation.py out [her2st/]

Slides of 40 patients are put together from the tissue of the bundled slide. Patients of the label ``nuclei``
have more tissue that is rich in nuclei; the label ``coin`` is tossed. Each slide is scanned twice: as it is,
and by an imagined scanner of other colours and focus. ``seal-tiny`` is compared with random weights. With
her2st (see ``03_gene_map.py``), expression and classes of spots are evaluated too: ``seal-tiny`` saw these
sections in training, and the page warns of it.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata
import cv2
import h5py
import numpy as np
import pandas as pd
from PIL import Image

from seal_extract import load_encoder
from seal_extract.cli import main as seal_extract
from seal_extract.demo import demo_slide, untrained_encoder
from seal_extract.evaluate.handcrafted import FEATURES, handcrafted_features
from seal_extract.slides.readers import Array
from seal_extract.train.formats import load_sections
from seal_extract.train.pairs import make_pairs
from seal_extract.train.sections import Section

PATIENTS, SIDE, WINDOW_PX, MPP = 40, 4, 224, 0.499  # slides of 4 x 4 windows
SHARE = 0.6  # of windows rich in nuclei for patients of the label, of the others for the rest
SCANNER = np.array([[1.02, 0.02, 0.0], [0.0, 0.94, 0.02], [0.0, 0.0, 0.9]])  # RGB to RGB
SECTIONS = ("C2", "C3", "C4", "C5")


def windows() -> Array:
    """Windows of the bundled slide that hold tissue, the richest in nuclei last: uint8 [N, S, S, 3]."""
    with Image.open(demo_slide()) as image:
        whole = np.asarray(image.convert("RGB"))
    places = range(0, whole.shape[0] - WINDOW_PX, 56), range(0, whole.shape[1] - WINDOW_PX, 56)
    cut = np.stack([whole[y : y + WINDOW_PX, x : x + WINDOW_PX] for y in places[0] for x in places[1]])
    features = handcrafted_features(np.moveaxis(cut, 3, 1))
    glass, nuclei = (features[:, FEATURES.index(name)] for name in ("glass share", "nuclear share"))
    order = np.argsort(nuclei)
    return np.asarray(cut[order[glass[order] < 0.1]])


def write_cohort(folder: Path) -> None:
    """Write slides as JPEG, and ``slides.csv`` with their labels, patients and scanners."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, tissue, rows = np.random.default_rng(0), windows(), []
    coin = rng.permutation(PATIENTS) % 2
    for i in range(PATIENTS):
        rich = rng.random(SIDE**2) < (SHARE if i % 2 else 1 - SHARE)
        chosen = (rng.random(SIDE**2) + rich) / 2 * len(tissue)
        parts = [np.rot90(tissue[int(row)], int(rng.integers(4))) for row in chosen]
        slide = np.vstack([np.hstack(parts[row : row + SIDE]) for row in range(0, SIDE**2, SIDE)])
        other = np.clip(cv2.GaussianBlur(slide, (0, 0), 0.8) @ SCANNER.T, 0, 255).astype(np.uint8)
        patient, labels = f"p{i:02}", {"nuclei": ("poor", "rich")[i % 2], "coin": ("head", "tail")[coin[i]]}
        for scanner, pixels in (("one", slide), ("other", other)):
            Image.fromarray(pixels).save(folder / f"{patient}_{scanner}.jpg", quality=90)
            row = {"slide": f"{patient}_{scanner}.jpg", "mpp": MPP, "case_id": patient, "specimen": patient}
            rows.append(row | labels | {"scanner": scanner})
    pd.DataFrame(rows).to_csv(folder / "slides.csv", index=False)


def write_sections(sections: Sequence[Section], her2st: Path, out: Path) -> None:
    """Write sections with classes of spots into ``spots/``, and as a task of HEST into ``hest/her2st/``."""
    task, genes = out / "hest" / "her2st", sorted(set.intersection(*(set(s.genes) for s in sections)))
    for folder in (out / "spots", task / "patches", task / "splits"):
        folder.mkdir(parents=True, exist_ok=True)
    total = sum(s.counts[:, [s.genes.index(gene) for gene in genes]].sum(0) for s in sections)
    genes = [genes[i] for i in np.argsort(-total)[:50]]
    (task / "var_50genes.json").write_text(json.dumps({"genes": genes}))
    files = pd.DataFrame({"sample_id": [section.name for section in sections]})
    files["patches_path"] = [f"patches/{section.name}.h5" for section in sections]
    files["expr_path"] = [f"../../spots/{section.name}.h5ad" for section in sections]
    for i, section in enumerate(sections):
        table = pd.read_csv(her2st / f"labels/{section.name}_labels_nn.csv")
        spots = table["x"].astype(str) + "x" + table["y"].astype(str)
        classes = table["label_nn"].set_axis(spots)
        obs, var = pd.DataFrame(index=list(section.barcodes)), pd.DataFrame(index=list(section.genes))
        obs["class"] = classes[classes != "undetermined"].reindex(obs.index)
        data = anndata.AnnData(section.counts, obs, var, obsm={"spatial": section.xy_l0})
        data.write_h5ad(out / f"spots/{section.name}.h5ad")
        shutil.copy(section.slide, out / f"spots/{section.name}.jpg")
        pairs = make_pairs([section], genes)
        with h5py.File(task / f"patches/{section.name}.h5", "w") as file:
            file["img"], file["coords"] = (
                np.moveaxis(pairs.patches, 1, 3),
                section.xy_l0[pairs.row].astype(int),
            )
            file["barcode"] = np.array([[section.barcodes[row].encode()] for row in pairs.row])
        files.drop(i).to_csv(task / f"splits/train_{i}.csv", index=False)
        files.loc[[i]].to_csv(task / f"splits/test_{i}.csv", index=False)


def main(out: str, her2st: str = "") -> dict[str, tuple[float, float]]:
    """Run all commands; return the 95 % interval of the AUC of both labels."""
    folder, spec = Path(out), replace(load_encoder("seal-tiny").spec, name="untrained")
    untrained_encoder(spec).save_pretrained(folder / "untrained")
    write_cohort(folder / "slides")
    run, table, page = (
        folder / "run",
        folder / "slides/slides.csv",
        ("-o", folder / "evaluation", "--overwrite"),
    )
    heads = ("--labels", table, "--heads", "abmil,linear-probe", *page)
    commands: list[tuple[object, ...]] = [
        (table, "-o", run, "--encoder", f"seal-tiny,{folder / 'untrained'}", "-q"),
        ("evaluate", "slides", run, "--label", "nuclei", *heads),
        ("evaluate", "slides", run, "--label", "coin", *heads),
        ("evaluate", "robustness", run, "--slides", table, *page),
    ]
    if her2st:
        sections = load_sections([{"kind": "st-tables", "folder": her2st, "names": list(SECTIONS)}])
        write_sections(sections, Path(her2st), folder)
        both = ("--encoder", "seal-tiny", "--base", folder / "untrained", *page)
        classes = ("--label", "class", "--by", "section", "--slide-mpp", sections[0].mpp)
        commands += [
            ("evaluate", "--sections", her2st, *both),
            ("evaluate", "hest", folder / "hest", *both),
            ("evaluate", "spots", folder / "spots", *classes, *both),
        ]
    for command in commands:
        if seal_extract([str(word) for word in command]):
            sys.exit(f"failed: {command}")
    found = {}
    for label in ("nuclei", "coin"):
        report = json.loads((folder / f"evaluation/slides-{label}.json").read_text())
        row = report["tables"][0]["rows"][0]
        found[label] = low, high = row["interval"]
        print(f"{label}, {row['line']}: AUC {row['mean']:.2f}, 95 % interval {low:.2f} to {high:.2f}")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)

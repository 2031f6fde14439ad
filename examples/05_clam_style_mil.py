"""A CLAM-style loop on the written files: which slides are tumour, and which patches say so?

python examples/05_clam_style_mil.py out/features_seal-conch labels.csv mil.pt

The labels are a CSV with the columns slide and label. The features are those of ``seal-extract slides/ -o out
--encoder seal-conch --layout clam``, which takes the model as ``--slide-level mil.pt``.
"""

import csv
import sys
from pathlib import Path

import h5py
import torch
from torch import Tensor, nn


class AttentionMIL(nn.Module):
    """Gated attention over the patches of a slide (Ilse et al. 2018, eq. 9), with the authors' names."""

    def __init__(self, dim: int, hidden: int = 128, classes: int = 2) -> None:
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid())
        self.attention_w, self.classifier = nn.Linear(hidden, 1), nn.Linear(dim, classes)

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Bag [N, D] -> logits [classes], attention [N]."""
        attention = self.attention_w(self.attention_V(bag) * self.attention_U(bag))[:, 0].softmax(0)
        return self.classifier(attention @ bag), attention


def main(folder: str, labels: str, checkpoint: str, epochs: str = "20") -> float:
    """Train on ``pt_files``, save, show where in ``h5_files`` the attention lies; returns the last loss."""
    torch.manual_seed(0)
    label_of = {r["slide"]: int(r["label"]) for r in csv.DictReader(Path(labels).read_text().splitlines())}
    bags = {s: torch.load(Path(folder) / "pt_files" / f"{s}.pt", weights_only=True) for s in label_of}
    model = AttentionMIL(dim=next(iter(bags.values())).shape[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(int(epochs)):
        total = 0.0
        for slide, bag in bags.items():
            loss = nn.functional.cross_entropy(model(bag)[0], torch.tensor(label_of[slide]))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item() / len(bags)
        print(f"epoch {epoch + 1}: loss {total:.4f}")
    torch.save(model.state_dict(), checkpoint)
    for slide in bags:
        with h5py.File(Path(folder) / "h5_files" / f"{slide}.h5") as file:
            logits, attention = model(torch.from_numpy(file["features"][:]))
            x, y = file["coords"][int(attention.argmax())]
        print(f"{slide}: class {int(logits.argmax())}, most attention at level-0 ({x}, {y})")
    return total


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 3 else sys.exit(__doc__)

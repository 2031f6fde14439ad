"""MIL models whose layers have the published names; their forward passes say what pooling must give."""

import numpy as np
import torch
from feature_fixtures import SIZE, grid_of, provenance_of
from torch import nn

from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import layout_of_grid
from seal_extract.features.store import read_features

DIM = 24  # of the features in these tests


def mlp(*layers):
    return nn.Sequential(*layers)


class Gated(nn.Module):
    """CLAM's names for the attention network with a gate."""

    def __init__(self, width, inner, rows, drop=()):
        super().__init__()
        self.attention_a = mlp(nn.Linear(width, inner), nn.Tanh(), *drop)
        self.attention_b = mlp(nn.Linear(width, inner), nn.Sigmoid(), *drop)
        self.attention_c = nn.Linear(inner, rows)

    def forward(self, h):
        return self.attention_c(self.attention_a(h) * self.attention_b(h))


class Plain(nn.Module):
    """CLAM's names for the one without."""

    def __init__(self, width, inner, rows, drop=()):
        super().__init__()
        self.module = mlp(nn.Linear(width, inner), nn.Tanh(), *drop, nn.Linear(inner, rows))

    def forward(self, h):
        return self.module(h)


class Clam(nn.Module):
    """Single and multi branch: ``branches`` networks over 512 hidden features."""

    def __init__(
        self, dim=DIM, hidden=512, inner=256, branches=1, classes=3, gate=Gated, drop=(), drop_fc=None
    ):
        super().__init__()
        drop_fc = drop if drop_fc is None else drop_fc
        net = gate(hidden, inner, branches, drop)
        self.attention_net = mlp(nn.Linear(dim, hidden), nn.ReLU(), *drop_fc, net)
        heads = [nn.Linear(hidden, 1) for _ in range(classes)]
        self.classifiers = nn.Linear(hidden, classes) if branches == 1 else nn.ModuleList(heads)
        self.instance_classifiers = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(classes))

    def pooled(self, x):
        hidden = self.attention_net[:2](x)
        scores = self.attention_net[-1](hidden).T
        return (scores.softmax(1) @ hidden).squeeze(0), scores

    def probabilities(self, embedding):
        if isinstance(self.classifiers, nn.Linear):
            return self.classifiers(embedding).softmax(0)
        each = zip(self.classifiers, embedding, strict=True)
        return torch.cat([classifier(row) for classifier, row in each]).softmax(0)


class Mil(nn.Module):
    """CLAM's MIL_fc of two classes, MIL_fc_mc of more."""

    def __init__(self, dim=DIM, classes=2):
        super().__init__()
        self.fc = mlp(nn.Linear(dim, 512), nn.ReLU(), nn.Dropout(0.25))
        setattr(self, "classifier" if classes == 2 else "classifiers", nn.Linear(512, classes))

    def pooled(self, x):
        """The embedding, the probability by which patches compete, and those of the winner."""
        hidden = self.fc(x)
        each = (self.classifier if hasattr(self, "classifier") else self.classifiers)(hidden).softmax(1)
        by = each[:, 1] if each.shape[1] == 2 else each.amax(1)
        top = int(by.argmax())
        return hidden[top], by, each[top]


class AmLab(nn.Module):
    """Ilse et al.: ``score`` is what the last layer is called, which differs between versions."""

    def __init__(self, dim=DIM, hidden=500, inner=128, rows=1, gated=True, embed=True, score="attention_w"):
        super().__init__()
        hidden = hidden if embed else dim
        if embed:
            self.feature_extractor_part2 = mlp(nn.Linear(dim, hidden), nn.ReLU())
        if gated:
            self.attention_V = mlp(nn.Linear(hidden, inner), nn.Tanh())
            self.attention_U = mlp(nn.Linear(hidden, inner), nn.Sigmoid())
            setattr(self, score, nn.Linear(inner, rows))
        else:
            self.attention = mlp(nn.Linear(hidden, inner), nn.Tanh(), nn.Linear(inner, rows))
        self.classifier = mlp(nn.Linear(hidden * rows, 1), nn.Sigmoid())
        self.score = score
        self.gated, self.embed = gated, embed

    def pooled(self, x):
        hidden = self.feature_extractor_part2(x) if self.embed else x
        if self.gated:
            scores = getattr(self, self.score)(self.attention_V(hidden) * self.attention_U(hidden)).T
        else:
            scores = self.attention(hidden).T
        return (scores.softmax(1) @ hidden).squeeze(0), scores

    def probabilities(self, embedding):
        if embedding.ndim > 1:
            return None  # the published code cannot run this one
        positive = self.classifier(embedding)
        return torch.cat([1 - positive, positive])


class Heads(nn.Module):
    """The pooler of TRIDENT's ABMIL."""

    def __init__(self, dim, inner, heads, gated):
        super().__init__()
        self.attention_heads = nn.ModuleList(
            mlp(nn.Linear(dim, inner), nn.Tanh(), nn.Dropout(0.1)) for _ in range(heads)
        )
        if gated:
            self.gating_layers = nn.ModuleList(
                mlp(nn.Linear(dim, inner), nn.Sigmoid(), nn.Dropout(0.1)) for _ in range(heads)
            )
        self.branching_layers = nn.ModuleList(nn.Linear(inner, 1) for _ in range(heads))
        if heads > 1:
            self.condensing_layer = nn.Linear(heads * dim, dim)

    def forward(self, h):
        found = [head(h) for head in self.attention_heads]
        if hasattr(self, "gating_layers"):
            found = [one * gate(h) for one, gate in zip(found, self.gating_layers, strict=True)]
        scores = torch.cat([c(one) for one, c in zip(found, self.branching_layers, strict=True)], 1).T
        embedding = (scores.softmax(1) @ h).flatten()
        return self.condensing_layer(embedding) if hasattr(self, "condensing_layer") else embedding, scores


class PathoBench(nn.Module):
    """TRIDENT's slide encoder as Patho-Bench trains it, under a classifier."""

    def __init__(self, dim=DIM, inner=16, heads=4, gated=True):
        super().__init__()
        around = [mlp(nn.Linear(dim, dim), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)]
        self.slide_encoder = nn.Module()
        self.slide_encoder.model = nn.ModuleDict(
            {
                "pre_attention_layers": around[0],
                "image_pooler": Heads(dim, inner, heads, gated),
                "post_attention_layers": around[1],
            }
        )
        self.classification_head = nn.Linear(dim, 2)

    def pooled(self, x):
        model = self.slide_encoder.model
        embedding, scores = model["image_pooler"](model["pre_attention_layers"](x))
        return model["post_attention_layers"](embedding), scores

    def probabilities(self, embedding):
        return self.classification_head(embedding).softmax(0)


class MilLab(nn.Module):
    """MIL-Lab's ABMIL: two layers on the features, heads one after the other."""

    def __init__(self, dim=DIM, hidden=64, inner=32, heads=2, gate=Gated):
        super().__init__()
        self.patch_embed = mlp(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(0.25), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.global_attn = gate(hidden, inner, heads, (nn.Dropout(0.25),))
        self.classifier = nn.Linear(hidden * heads, 2)

    def pooled(self, x):
        hidden = self.patch_embed(x)
        scores = self.global_attn(hidden).T
        return (scores.softmax(1) @ hidden).flatten(), scores

    def probabilities(self, embedding):
        return self.classifier(embedding).softmax(0)


class Chief(Clam):
    """CHIEF: CLAM's names, a sum of the features themselves, and parts that need the organ."""

    def __init__(self, dim=DIM):
        super().__init__(dim, classes=2, drop=DROP)
        self.att_head = nn.ModuleDict({"fc1": nn.Linear(512, 256), "fc2": nn.Linear(256, 1)})
        self.text_to_vision = mlp(nn.Linear(768, 512))
        self.register_buffer("organ_embedding", torch.zeros(19, 768))

    def pooled(self, x):
        scores = super().pooled(x)[1]
        return (scores.softmax(1) @ x).squeeze(0), scores

    def probabilities(self, embedding):
        return None


class Tangle(nn.Module):
    """TANGLE: LayerNorm behind each layer, and a head sees every ``heads``-th of the last outputs."""

    def __init__(self, dim=DIM, hidden=32, heads=4):
        super().__init__()
        layers, widths = [], [hidden, hidden, hidden * heads] if heads > 1 else [hidden, hidden]
        for before, width in zip([dim, *widths], widths, strict=False):
            layers += [nn.Linear(before, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(0.1)]
        self.wsi_embedder = nn.Module()
        self.wsi_embedder.pre_attn = mlp(*layers)
        gates = [Gated(hidden, hidden, 1, DROP) for _ in range(heads)]
        self.wsi_embedder.attn = nn.ModuleList(gates) if heads > 1 else gates[0]
        if heads > 1:
            self.wsi_embedder.proj_multihead = nn.Linear(hidden * heads, hidden)
        self.rna_embedder = mlp(nn.Linear(5, hidden))
        self.heads = heads

    def pooled(self, x):
        wsi = self.wsi_embedder
        hidden = wsi.pre_attn(x)
        if self.heads == 1:
            scores = wsi.attn(hidden).T
            return (scores.softmax(1) @ hidden).squeeze(0), scores
        seen = [hidden[:, head :: self.heads] for head in range(self.heads)]
        scores = torch.cat([gate(own) for gate, own in zip(wsi.attn, seen, strict=True)], 1).T
        sums = [row.softmax(0) @ own for row, own in zip(scores, seen, strict=True)]
        return wsi.proj_multihead(torch.stack(sums, 1).flatten()), scores

    def probabilities(self, embedding):
        return None


DROP = (nn.Dropout(0.25),)
MODELS = {
    "CLAM_SB small": (Clam, {}),
    "CLAM_SB big": (Clam, {"inner": 384}),
    "CLAM_SB with dropout": (Clam, {"drop": DROP}),
    "CLAM_SB with dropout on the features alone": (Clam, {"drop_fc": DROP}),
    "CLAM_SB of 512": (Clam, {"dim": 512, "hidden": 256, "inner": 128}),
    "CLAM_SB without gate": (Clam, {"gate": Plain}),
    "CLAM_SB without gate, with dropout": (Clam, {"gate": Plain, "drop": DROP}),
    "CLAM_MB small": (Clam, {"branches": 3}),
    "CLAM_MB big with dropout": (Clam, {"branches": 3, "inner": 384, "drop": DROP}),
    "ABMIL gated": (AmLab, {}),
    "ABMIL gated, its older name": (AmLab, {"score": "attention_weights"}),
    "ABMIL": (AmLab, {"gated": False}),
    "ABMIL of two branches": (AmLab, {"rows": 2}),
    "ABMIL on the features themselves": (AmLab, {"embed": False}),
    "ABMIL of TRIDENT": (PathoBench, {}),
    "ABMIL of TRIDENT, one head without gate": (PathoBench, {"heads": 1, "gated": False}),
    "ABMIL of MIL-Lab": (MilLab, {}),
    "ABMIL of MIL-Lab, one head without gate": (MilLab, {"heads": 1, "gate": Plain}),
    "CHIEF": (Chief, {}),
    "TANGLE": (Tangle, {}),
    "TANGLE of one head": (Tangle, {"heads": 1}),
}


def model_of(kind, **kwargs):
    """A model of `MODELS` with random weights, ready to be asked."""
    torch.manual_seed(7)
    build, chosen = MODELS[kind]
    return build(**(chosen | kwargs)).eval()


def save(model, path):
    torch.save(model.state_dict(), path)
    return path


def write_features(folder, rows, *, layout="trident", name="a", unreadable=(), encoder="tiny"):
    """A features file with these rows, as a run leaves it."""
    grid = grid_of(len(rows))
    place = layout_of_grid(layout, folder, grid)
    provenance = provenance_of(grid, encoder=encoder)
    provenance["unreadable"] = [{"row": row} for row in unreadable]
    label = SlideLabel(name, SIZE, 0.25)
    with place.write_features(label, grid, encoder, rows.shape[1], provenance) as writer:
        for start in range(0, len(rows), 5000):
            writer.append(rows[start : start + 5000])
    return read_features(place.place(name, encoder, grid))


def rows_of(n, dim=DIM, seed=0):
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)

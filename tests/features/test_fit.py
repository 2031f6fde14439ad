"""Which feature files a slide encoder takes, and what to type for others."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from feature_fixtures import SIZE, grid_of, provenance_of, short_of

from seal_extract.encoders.slide_encoders import SLIDE_ENCODERS
from seal_extract.errors import UsageError
from seal_extract.features.feature_file import SlideLabel
from seal_extract.features.layouts import layout_of_grid
from seal_extract.features.verify import verify


def write(out, name, *, layout="trident", encoder=None, dim=None, recipe=None, **grid):
    """A file of ours that fits the slide encoder ``name``, but for the changes."""
    row = SLIDE_ENCODERS[name]
    fitting = {"patch_px": row.patch_px, "mpp": row.mpp}
    grid = replace(grid_of(30), **fitting | grid)
    provenance = provenance_of(grid, encoder=encoder or row.encoder)
    provenance["request"]["encoder"] = {"input": f"{recipe or row.input}; mean [0.5], std [0.5]"}
    place, dim = layout_of_grid(layout, out, grid), dim or row.encoder_dim
    with place.write_features(SlideLabel("a", SIZE, 0.25), grid, row.encoder, dim, provenance) as writer:
        writer.append(np.random.default_rng(0).standard_normal((30, dim)).astype(np.float32))
    return place.features("a", row.encoder)


def write_tridents(path, row, encoder, **attrs):
    """A file as TRIDENT writes it, but for the changed attributes; None leaves one out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    xy = np.stack([np.arange(30) % 10, np.arange(30) // 10], axis=1).astype(np.int64) * 1024
    attrs = {"patch_size": row.patch_px, "patch_size_level0": 1024, "target_magnification": 20} | attrs
    with h5py.File(path, "w") as file:
        file["features"] = np.ones((30, row.encoder_dim), np.float32)
        file["coords"] = xy
        file["coords"].attrs.update({name: value for name, value in attrs.items() if value is not None})
        if encoder:
            file["features"].attrs["encoder"] = encoder
    return path


@pytest.mark.parametrize("layout", ["trident", "flat", "clam"])
@pytest.mark.parametrize("name", SLIDE_ENCODERS)
def test_what_its_command_makes_fits(tmp_path, name, layout):
    if layout != "clam" or not SLIDE_ENCODERS[name].positions:  # CLAM's files have no patch_size_level0
        write(tmp_path, name, layout=layout)
        assert verify(tmp_path, name) == ()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("titan", {"encoder": "uni"}, "features of uni; titan takes conch-v1.5 (768 columns)"),
        ("titan", {"encoder": "conch-v1.5+lora"}, "features of conch-v1.5+lora; titan takes conch-v1.5"),
        ("titan", {"dim": 512}, "features of 512 columns; titan takes 768 of conch-v1.5"),
        ("titan", {"patch_px": 256}, "trained on patches of 512 px at 0.5 µm/px; these are 256 px at 0.5"),
        ("prism", {"mpp": 0.25}, "trained on patches of 224 px at 0.5 µm/px; these are 224 px at 0.25"),
        ("gigapath", {"recipe": "resized to 224 px, bicubic, middle square"}, "takes them resized to 256 px"),
        (
            "moozy",
            {"encoder": "lunit-vits8", "recipe": "own"},
            "got patches own; moozy takes them resized to 248",
        ),
        ("feather", {"encoder": "virchow"}, "takes conch-v1.5 (768 columns) or univ2 (1536 columns) or uni"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, name, changes, words):
    write(tmp_path, "feather-uni" if name == "feather" else name, **changes)
    (problem,) = short_of(tmp_path, name)
    assert words in problem.problem


def test_a_family_takes_the_file_of_each_member(tmp_path):
    for name in ("feather-uni", "feather-univ2", "feather-conch15"):
        write(tmp_path, name)
    assert verify(tmp_path, "feather") == ()
    assert len(short_of(tmp_path, "feather-univ2")) == 2


def test_overlap_is_a_warning_where_places_are_counted(tmp_path):
    write(tmp_path, "titan", overlap_px=64)
    (problem,) = [p for p in verify(tmp_path, "titan") if "overlap" in p.problem]
    assert problem.is_warning
    write(tmp_path / "prism", "prism", overlap_px=64)
    assert [p for p in verify(tmp_path / "prism", "prism") if "overlap" in p.problem] == []


@pytest.mark.parametrize(
    ("encoder", "attrs", "words"),
    [
        ("conch-v1.5", {}, None),
        ("conch-v1.5", {"patch_size_level0": None}, "attribute patch_size_level0 on 'coords' is None"),
        ("conch-v1.5", {"patch_size_level0": 512}, None),
        ("conch-v1.5", {"target_magnification": 40}, "these are 512 px at 0.25 µm/px"),
        ("conch-v1.5", {"patch_size": None}, "warning: does not say how large its patches are"),
        ("conch-v1.5", {"patch_level": 1}, "warning: does not say how large its patches are"),
        (None, {}, "warning: does not name its encoder"),
        ("uni_v9", {}, "features of uni_v9; titan takes conch-v1.5"),
    ],
)
def test_files_of_other_tools_are_judged_by_their_attributes(tmp_path, encoder, attrs, words):
    path = write_tridents(tmp_path / "features_x/a.h5", SLIDE_ENCODERS["titan"], encoder, **attrs)
    found = [str(problem).removeprefix(f"{path}: ") for problem in verify(tmp_path, "titan")]
    if attrs.get("patch_size_level0") == 512:
        words = "neighbouring coordinates are 1024 apart, but patch_size_level0 means 512"
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_the_embedding_of_a_slide_and_unknown_names_are_refused(tmp_path):
    write_tridents(tmp_path / "slide_features_x/a.h5", SLIDE_ENCODERS["titan"], "conch-v1.5")
    (problem,) = short_of(tmp_path / "slide_features_x", "titan")
    assert "is the embedding of a whole slide" in problem.problem
    with pytest.raises(UsageError, match=r"--for is 'threads'; allowed: clam, .*titan, prism"):
        verify(tmp_path, "threads")
    with pytest.raises(UsageError, match=r"nothing that titan reads: looked for \*.h5 in the folder itself"):
        verify(tmp_path, "titan")


def test_the_guide_has_the_table(request):
    guide = (request.config.rootpath / "examples/README.md").read_text("utf-8")
    for row in SLIDE_ENCODERS.values():
        file = "" if row.source else "=FILE"
        here = f" `--slide-level {row.name}{file}` |" if row.published else " |"
        reads = "yes" if row.positions else "no"
        facts = f"{row.encoder_dim} | {row.patch_px} | {row.mpp:g} | {reads} |"
        assert f"| `{row.name}` | `{row.encoder}` | {facts}{here}\n" in guide, row.name


def test_the_command_says_what_makes_fitting_files(run, tmp_path):
    write(tmp_path, "titan", encoder="uni")
    status, out, err = run("verify", tmp_path, "--for", "titan")
    assert (status, len(out), len(err)) == (1, 1, 1)
    command = "seal-extract SLIDES -o OUT --encoder conch-v1.5 --patch-px 512 --mpp 0.5"
    assert err[0].endswith(f"1 of 1 files are not as titan expects; make features for it with: {command}")
    write(tmp_path, "titan")
    assert run("verify", tmp_path, "--for", "titan")[:2] == (0, ["1 of 1 files are as titan expects"])

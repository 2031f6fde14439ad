"""Sections of one drawn tissue, turned and moved: they are laid on each other, or refused."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from seal_extract.cli import main
from seal_extract.errors import SealExtractError
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.planes import apply
from seal_extract.volume.register import register_sections
from seal_extract.volume.volume import open_volume

MPP, SIDE = 4.0, 900
SHAPE = np.array([(250, 300), (600, 220), (690, 480), (430, 640), (300, 560)])


def tissue(affine=None, mpp=MPP, shape=SHAPE, seed=0):
    """Purple texture in a polygon on glass: coarse structure that sections share, fine that they do not."""
    rng, own = np.random.default_rng(0), np.random.default_rng(seed)
    scale = MPP / mpp
    coarse = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)).astype(np.float32), (0, 0), 12) * 700
    fine = cv2.GaussianBlur(own.normal(size=(SIDE, SIDE)).astype(np.float32), (0, 0), 1.2) * 90
    inside = cv2.fillPoly(np.zeros((SIDE, SIDE), np.uint8), [shape.astype(np.int32)], 1)[..., None]
    stained = np.array([150.0, 90, 150]) + (coarse + fine)[..., None] * np.array([0.7, 1, 0.4])
    picture = np.where(inside, stained.clip(20, 225), 240).astype(np.uint8)
    matrix = np.eye(2, 3) if affine is None else affine
    matrix = np.diag([scale, scale]) @ matrix
    size = (round(SIDE * scale), round(SIDE * scale))
    return cv2.warpAffine(picture, matrix, size, borderValue=(240, 240, 240), flags=cv2.INTER_CUBIC)


def turned(degrees, shift):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    middle = np.array([SIDE / 2, SIDE / 2])
    linear = np.array([[c, -s], [s, c]])
    return np.hstack([linear, (middle + shift - linear @ middle)[:, None]])


def write(folder, name, picture, mpp=MPP):
    Image.fromarray(picture).save(folder / f"{name}.png")
    return SlideEntry(folder / f"{name}.png", name, mpp)


def test_turned_and_moved_sections_come_to_lie_on_the_first(tmp_path):
    moves = [turned(137, (40, -25)), turned(-61, (-30, 50))]
    entries = [write(tmp_path, "A", tissue())]
    entries += [write(tmp_path, f"B{i}", tissue(move, seed=i + 1)) for i, move in enumerate(moves)]
    lines = []
    found = register_sections(entries, tmp_path / "v.json", 10.0, mpp=MPP, log=lines.append)
    places = SHAPE.astype(float)
    for one, move in zip(found[1:], moves, strict=True):
        off = apply(one.transform, apply(move, places)) - places
        assert np.linalg.norm(off, axis=1).max() * MPP < 30  # µm, at the corners of the tissue
        assert one.overlap > 0.95
        assert one.residual_um < 20
        assert one.agreement > 0.5
    assert lines[0] == "A: the frame"
    assert "tissue overlaps by 9" in lines[1]
    assert cv2.imread(str(tmp_path / "v.jpg")).shape == (500, 1000, 3)
    volume = open_volume(tmp_path / "v.json")
    assert (len(volume), volume.spacing_um, volume.mpp) == (3, 10.0, MPP)
    with volume.planes[2].open() as plane, volume.planes[0].open() as frame:
        box = ((350, 350), 0, (200, 200))
        seen, there = (s.read_region(*box).astype(float).mean(2) for s in (plane, frame))
    seen, there = (cv2.GaussianBlur(pixels, (0, 0), 4).ravel() for pixels in (seen, there))
    assert np.corrcoef(seen, there)[0, 1] > 0.8


def test_sections_that_do_not_fit_are_refused_in_one_line(tmp_path):
    strip = np.array([(100, 420), (800, 430), (800, 470), (100, 460)])
    entries = [write(tmp_path, "A", tissue()), write(tmp_path, "B", tissue(shape=strip))]
    with pytest.raises(SealExtractError, match=r"B cannot be laid on A: their tissue overlaps by .*by hand"):
        register_sections(entries, tmp_path / "v.json", 10.0, mpp=MPP)
    entries[1] = write(tmp_path, "B", np.full((SIDE, SIDE, 3), 240, np.uint8))
    with pytest.raises(SealExtractError, match="no tissue was found to register it by"):
        register_sections(entries, tmp_path / "v.json", 10.0, mpp=MPP)
    with pytest.raises(SealExtractError, match="1 section is given; give two or more"):
        register_sections(entries[:1], tmp_path / "v.json", 10.0, mpp=MPP)
    assert not (tmp_path / "v.json").exists()


def test_the_command_writes_a_volume_of_sections_of_two_resolutions(tmp_path, capsys):
    write(tmp_path, "A", tissue())
    write(tmp_path, "B", tissue(turned(20, (0, 30)), seed=1))
    out = tmp_path / "v.json"
    command = ["volume", "register", str(tmp_path / "A.png"), str(tmp_path / "B.png"), "-o", str(out)]
    assert main([*command, "--spacing-um", "5", "--slide-mpp", "4"]) == 0
    assert "B: rigid, tissue overlaps by 9" in capsys.readouterr().out
    assert json.loads(out.read_text())["planes"][1]["slide"] == "B.png"
    assert main([*command, "--spacing-um", "5", "--slide-mpp", "4"]) == 2
    assert "--overwrite" in capsys.readouterr().err

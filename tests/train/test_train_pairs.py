"""Patches around spots compared with a plain crop; batches whose order depends on seed and epoch; regions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image
from section_files import GENES, counts_of, draw, hexagon, make_section, places, square

from seal_extract.errors import SlideError, UsageError
from seal_extract.train.formats import load_sections
from seal_extract.train.pairs import Batches, Pairs, make_pairs, neighbourhoods

PATCH_PX = 32


@pytest.fixture
def section(tmp_path):
    return make_section("square", slide=draw(tmp_path / "S1.png"))


def crop(section, row, size_l0):
    """A patch as one would cut it by hand, int [H, W, 3]."""
    x, y = np.round(section.xy_l0[row] - size_l0 / 2).astype(int)
    image = Image.open(section.slide).convert("RGB").crop((x, y, x + size_l0, y + size_l0))
    return np.asarray(image.resize((PATCH_PX, PATCH_PX), Image.Resampling.BICUBIC), int)


def test_at_the_slides_own_resolution_patches_are_its_pixels(section):
    pairs = make_pairs([section], GENES, PATCH_PX, 0.5)
    assert pairs.patches.shape == (25, 3, PATCH_PX, PATCH_PX)
    assert pairs.patches.dtype == np.uint8
    for row in range(25):
        np.testing.assert_array_equal(pairs.patches[row].transpose(1, 2, 0), crop(section, row, PATCH_PX))
    np.testing.assert_allclose(pairs.xy_um, section.xy_l0 * 0.5)
    np.testing.assert_array_equal(pairs.expression, section.log1p())
    assert repr(pairs) == "Pairs(25 patches of 32 px, 5 genes, of S1)"
    some = make_pairs([section], ("VIM", "ACTB"), PATCH_PX)
    np.testing.assert_array_equal(some.expression, section.log1p()[:, [4, 0]])
    assert some.panel == ("VIM", "ACTB")


@pytest.mark.filterwarnings("ignore:S1. patches at 0.5 µm/px are enlarged")
@pytest.mark.parametrize(("mpp", "size_l0"), [(0.25, 64), (0.17, 94), (0.687, 23)])
def test_slides_of_other_resolutions_are_resampled_as_by_pillow(section, mpp, size_l0):
    other = replace(section, mpp=mpp)
    for row, patch in enumerate(make_pairs([other], GENES, PATCH_PX, 0.5).patches):
        assert np.abs(patch.transpose(1, 2, 0).astype(int) - crop(other, row, size_l0)).max() <= 1


def test_a_coarser_slide_is_enlarged_and_that_is_said(section):
    with pytest.warns(UserWarning, match=r"S1: patches at 0.5 µm/px are enlarged from the slide's 0.687"):
        make_pairs([replace(section, mpp=0.687)], GENES, PATCH_PX, 0.5)


def test_spots_that_would_leave_the_slide_are_left_out_and_said(tmp_path):
    edge = make_section("square", slide=draw(tmp_path / "S1.png", (700, 1000)))
    kept = square()[:, 1] < 3
    for smooth in (False, True):  # neighbours whose own patch is left out count when smoothing
        with pytest.warns(UserWarning, match="S1: 10 of 25 spots are left out, as their patches would leave"):
            pairs = make_pairs([edge], GENES[:2], PATCH_PX, 0.5, smooth=smooth)
        np.testing.assert_array_equal(pairs.row, np.flatnonzero(kept))
        expected = edge.log1p(GENES[:2])
        expected = edge.smoothed(expected) if smooth else expected
        np.testing.assert_array_equal(pairs.expression, expected[kept])


def test_pairs_refuse(section):
    for change, genes, error, message in [
        ({}, ("CD4",), UsageError, "S1 lacks 1 of 1 genes, the first CD4"),
        (
            {"xy_l0": section.xy_l0 + 5000},
            GENES,
            UsageError,
            r"all 25 spots lie outside S1.png of 1200 x 1000",
        ),
        ({"mpp": None}, GENES, SlideError, "the file does not say how many µm a pixel measures"),
        ({"slide": section.slide.with_name("gone.png")}, GENES, SlideError, "does not exist"),
    ]:
        with pytest.raises(error, match=message):
            make_pairs([replace(section, **change)], genes)


def test_several_sections_stay_apart(section, tmp_path):
    slide = draw(tmp_path / "S2.png", seed=1)
    other = make_section("hexagonal", name="S2", patient="P2", slide=slide, counts=counts_of(25, 1))
    pairs = make_pairs([section, other], GENES, PATCH_PX)
    assert (pairs.names, pairs.patients) == (("S1", "S2"), ("P1", "P2"))
    np.testing.assert_array_equal(pairs.section, [0] * 25 + [1] * 25)
    np.testing.assert_array_equal(pairs.expression[25:], other.log1p())
    np.testing.assert_array_equal(pairs.patches[25].transpose(1, 2, 0), crop(other, 0, PATCH_PX))
    near = neighbourhoods(pairs)  # both lie at the same µm, yet no region spans them
    assert (near[:25] < 25).all()
    assert ((near[25:] >= 25) | (near[25:] == -1)).all()
    assert [set(b.row.tolist()) for b in Batches(pairs, 4).whole()] == [set(range(25)), set(range(25, 50))]


def test_embeddings_come_along_if_all_sections_have_them(section):
    table = np.arange(50, dtype=np.float32).reshape(25, 2)
    one, other = replace(section, embeddings=table), make_section(name="S2", slide=section.slide)
    pairs = make_pairs([one], GENES, PATCH_PX)
    np.testing.assert_array_equal(pairs.embeddings, table)
    np.testing.assert_array_equal(Batches(pairs, 4).take(np.array([3, 0])).embedding, table[[3, 0]])
    assert make_pairs([one, other], GENES, PATCH_PX).embeddings is None


# --- batches ----------------------------------------------------------------------------------------


def pairs_of(array_rc, lattice="square", side=2):
    n = len(array_rc)
    return Pairs(
        patches=np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 3, side, side)),
        expression=np.arange(n, dtype=np.float32)[:, None],
        section=np.zeros(n, np.int64),
        names=("S1",),
        patients=("P1",),
        panel=("A",),
        xy_um=places(array_rc, lattice, 200.0) * 0.5,
        row=np.arange(n),
    )


def rows(batches, epoch, **ranks):
    return [batch.row.tolist() for batch in batches.epoch(epoch, **ranks)]


def test_the_order_depends_on_seed_and_epoch_alone():
    pairs = pairs_of(square())
    one, other = Batches(pairs, 4, seed=1), Batches(pairs, 4, seed=1)
    first = rows(one, 0)
    np.random.seed(5)
    torch.manual_seed(5)
    rows(other, 7)  # what was asked before does not count
    assert rows(other, 0) == first == rows(one, 0)
    assert rows(one, 1) != first
    assert rows(Batches(pairs, 4, seed=2), 0) != first


def test_an_epoch_takes_every_pair_once_and_whole_batches_only():
    batches = Batches(pairs_of(square()), 4)
    taken = rows(batches, 0)
    assert len(batches) == len(taken) == 6
    assert all(len(batch) == 4 for batch in taken)
    assert len({row for batch in taken for row in batch}) == 24
    left = [set(range(25)) - {r for b in rows(batches, e) for r in b} for e in range(20)]
    assert len({one for (one,) in left}) > 5  # not always the same one is left


def test_ranks_share_an_epoch():
    batches = Batches(pairs_of(square()), 4)
    both = [rows(batches, 3, rank=rank, ranks=2) for rank in range(2)]
    assert [b for pair in zip(*both, strict=True) for b in pair] == rows(batches, 3)
    uneven = [rows(batches, 3, rank=rank, ranks=4) for rank in range(4)]
    assert [len(u) for u in uneven] == [1, 1, 1, 1]  # 6 batches: two are left, so that none waits


def test_rows_keep_what_belongs_together():
    for batch in Batches(pairs_of(square()), 5).epoch(0):
        np.testing.assert_array_equal(batch.expression[:, 0], batch.row)
        np.testing.assert_array_equal(batch.patches[:, 0, 0, 0], batch.row)
        assert (batch.patches.dtype, batch.expression.dtype) == (torch.uint8, torch.float32)
        assert (batch.region, batch.embedding) == (None, None)
        assert len(batch) == len(batch.to(torch.device("cpu"))) == 5


@pytest.mark.parametrize("size", [26, 1, 0])
def test_a_batch_larger_than_the_pairs_is_refused(size):
    with pytest.raises(UsageError, match=f"batch_size is {size}, but S1 have 25 pairs; type batch_size = 25"):
        Batches(pairs_of(square()), size)


# --- regions ----------------------------------------------------------------------------------------


def test_regions_are_a_patch_and_its_true_neighbours():
    array_rc = square()
    near = neighbourhoods(pairs_of(array_rc))
    assert near.shape == (25, 9)
    np.testing.assert_array_equal(near[:, 0], np.arange(25))
    for row, others in enumerate(near):
        steps = np.abs(array_rc - array_rc[row]).max(1)
        assert set(others) - {-1} == set(np.flatnonzero(steps <= 1))
    assert (neighbourhoods(pairs_of(hexagon(), "hexagonal"))[12] >= 0).sum() == 7
    assert neighbourhoods(pairs_of(np.array([[0, 0]]))).tolist() == [[0] + [-1] * 8]


def test_batches_of_regions():
    batches = Batches(pairs_of(square()), 3, regions=True)
    batch = batches.take(np.array([12, 0]))
    assert batch.region.tolist() == [0] * 9 + [1] * 4
    assert batch.row[[0, 9]].tolist() == [12, 0]
    np.testing.assert_array_equal(batch.expression[:, 0], batch.row)
    assert all(batch.region.max() == 2 for batch in batches.epoch(0))


# --- the real thing ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*are enlarged:UserWarning")
def test_her2st_itself():
    names, folder = ["C2", "C3", "C4", "C5"], str(shared("data", "her2st"))
    with pytest.warns(UserWarning, match="are left out"):
        sections = load_sections([{"kind": "st-tables", "folder": folder, "names": names}])
    assert {section.patient for section in sections} == {"C"}
    assert [section.mpp for section in sections] == pytest.approx([0.687] * 4, rel=0.01)
    pairs = make_pairs(sections, ("ERBB2", "GAPDH"), 64)
    assert np.bincount(pairs.section).tolist() == [187, 180, 184, 181]
    found = {(i, j) for i, row in enumerate(neighbourhoods(pairs).tolist()) for j in row if j >= 0}
    places = np.concatenate([section.array_rc for section in sections])
    step = np.abs(places[:, None] - places).max(2)
    true = set(zip(*np.nonzero((step <= 1) & (pairs.section[:, None] == pairs.section)), strict=True))
    assert found <= true
    assert len(found) >= 0.98 * len(true)

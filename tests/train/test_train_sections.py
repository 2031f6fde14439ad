"""Sections: log1p, smoothing and the panel by hand, neighbours counted, and what is refused."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from section_files import GENES, counts_of, hexagon, make_section, places, square

from seal_extract.errors import UsageError
from seal_extract.train.sections import choose_panel

TWO = np.array([[0, 0], [0, 1]])


def two_spots(counts, genes=("A", "B"), kind=np.asarray, **over):
    return make_section("square", TWO, counts=kind(np.array(counts, np.float32)), genes=genes, **over)


def test_a_section_says_what_it_is():
    assert repr(make_section()) == "Section(S1 of P1: 25 spots, 5 genes, 0.5 µm/px by mpp)"
    assert repr(make_section(mpp=None)) == "Section(S1 of P1: 25 spots, 5 genes, µm/px of the file)"


@pytest.mark.parametrize("kind", [np.asarray, csr_matrix])
def test_log1p_by_hand(kind):
    section = two_spots([[1, 3], [0, 0]], kind=kind)
    expected = np.log1p([[2500, 7500], [0, 0]])
    np.testing.assert_allclose(section.log1p(), expected, rtol=1e-6)
    assert section.log1p().dtype == np.float32
    # of some genes, in the order asked, but still scaled by the sum over all
    np.testing.assert_allclose(section.log1p(["B"]), expected[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(section.log1p(["B", "A"]), expected[:, ::-1], rtol=1e-6)


def test_what_is_log1p_already_is_taken_as_it_is():
    section = two_spots([[7.8, 8.9], [0, 9.2]], scale="log1p")
    np.testing.assert_array_equal(section.log1p(["B"]), np.float32([[8.9], [9.2]]))


@pytest.mark.parametrize(
    ("lattice", "inside", "corner"), [("hexagonal", 6, (2, 3)), ("square", 4, (2,)), ("none", 0, (0,))]
)
def test_spots_have_their_true_neighbours(lattice, inside, corner):
    section = make_section(lattice, hexagon() if lattice == "hexagonal" else square())
    neighbours = section.neighbours()
    count = (neighbours >= 0).sum(1)
    assert neighbours.shape == (25, inside)
    assert count[len(section) // 2] == inside
    assert count[0] in corner
    for row, others in enumerate(neighbours):
        others = others[others >= 0]
        assert len(set(others)) == len(others)
        distance = np.linalg.norm(section.xy_l0[others] - section.xy_l0[row], axis=1)
        np.testing.assert_allclose(distance, 200)  # the pitch
        assert all(row in neighbours[other] for other in others)


def test_neighbours_do_not_depend_on_the_order_of_spots_nor_on_where_the_array_begins():
    array_rc = hexagon()
    order = np.random.default_rng(0).permutation(len(array_rc))
    first = make_section("hexagonal", array_rc).neighbours()
    moved = make_section("hexagonal", array_rc[order] + [40, 60]).neighbours()
    for row in range(len(array_rc)):
        others = moved[row][moved[row] >= 0]
        assert set(order[others]) == set(first[order[row]]) - {-1}


def test_smoothing_by_hand():
    # a row of three: the middle has two neighbours, the ends have one, a fourth far away has none
    array_rc = np.array([[0, 0], [0, 1], [0, 2], [5, 5]])
    values = np.float32([[0], [4], [2], [9]])
    for lattice, expected in (("square", [[2], [2.5], [3], [9]]), ("none", [[0], [4], [2], [9]])):
        section = make_section(lattice, array_rc, counts=np.ones((4, 1), np.float32), genes=("A",))
        np.testing.assert_array_equal(section.smoothed(values), expected)
    np.testing.assert_array_equal(values, [[0], [4], [2], [9]])  # the input stays


def test_some_of_the_spots():
    section = make_section(embeddings=np.arange(50, dtype=np.float32).reshape(25, 2))
    some = section.take(np.array([3, 1]))
    assert some.barcodes == ("SPOT003-1", "SPOT001-1")
    for name in ("counts", "xy_l0", "array_rc", "embeddings"):
        np.testing.assert_array_equal(getattr(some, name), getattr(section, name)[[3, 1]])


def test_the_panel_by_hand():
    # log1p of 10,000 a spot: HIGH alternates, LOW is constant, MID alternates less
    genes = ("HIGH", "LOW", "MID", "REST")
    one = two_spots([[0, 10, 20, 70], [40, 10, 10, 40]], genes)
    assert choose_panel([one], 3) == ("HIGH", "MID", "REST")
    assert choose_panel([one], 4)[-1] == "LOW"


def test_equals_go_by_name_and_only_common_genes_are_asked():
    one = two_spots([[1, 1, 2], [1, 1, 2]], ("B", "A", "ONLY"))
    other = two_spots([[1, 1], [1, 1]], ("A", "B"))
    assert choose_panel([one, other], 2) == ("A", "B")


def test_the_mean_is_over_sections_not_over_spots():
    quiet, loud = two_spots([[5, 5], [5, 5]]), two_spots([[9, 1], [1, 9]])
    apart = two_spots([[100, 1], [100, 1]])  # another depth or batch adds nothing
    assert choose_panel([quiet, loud, apart], 2) == choose_panel([loud], 2)


NORMALISED = np.log1p(counts_of(25))
NOTHING = np.empty((0, 2), np.int64)
REFUSED = {
    "lengths": ({"genes": GENES[:4]}, r"25 barcodes, 25 positions and 4 genes for counts of 25 x 5"),
    "twice": ({"genes": ("ACTB", "ACTB", "C", "D", "E")}, "1 genes occur twice, the first is ACTB"),
    "barcode": ({"barcodes": ("X",) * 25}, "1 barcodes occur twice, the first is X"),
    "normalised": ({"counts": NORMALISED}, 'not whole numbers .*normalised already.*counts_are = "log1p"'),
    "sparse": ({"counts": csr_matrix(NORMALISED)}, "not whole numbers"),
    "whole": ({"scale": "log1p"}, 'counts_are is "log1p", but the numbers are whole .*counts_are = "counts"'),
    "large": ({"scale": "log1p", "counts": NORMALISED * 99}, "but the numbers are too large"),
    "negative": ({"counts": counts_of(25) - 9}, "NaN, infinity or numbers below 0; give raw counts"),
    "nan": ({"counts": np.full((25, 5), np.nan)}, "NaN, infinity or numbers below 0"),
    "scale": ({"scale": "tpm"}, "counts_are is 'tpm'; allowed: counts, log1p"),
    "empty": (
        {"array_rc": NOTHING, "counts": np.empty((0, 5)), "xy_l0": places(NOTHING, "square", 1.0)},
        "S1 has no spot with both counts and a position",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    over, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as caught:
        make_section(**over)
    assert "\n" not in str(caught.value)


def test_genes_that_were_not_measured_or_not_in_all_sections():
    section, ids = make_section(), make_section(genes=tuple(f"ENSG0{i}" for i in range(5)))
    for message, call in [
        (
            "S1 lacks 1 of 2 genes, the first CD4; it has ACTB, VIM and so on$",
            lambda: section.log1p(["VIM", "CD4"]),
        ),
        ("one side has Ensembl ids, the other symbols; name genes alike", lambda: section.log1p(["ENSG0"])),
        ("have 5 genes in common, 9 are asked for; type genes = 5 or", lambda: choose_panel([section], 9)),
        ("have 0 genes in common.*one side has Ensembl ids", lambda: choose_panel([section, ids], 2)),
    ]:
        with pytest.raises(UsageError, match=message):
            call()

"""A predicted volume as its page shows it: what the server answers, and in a real browser."""

import io

import numpy as np
import pytest
import zarr
from PIL import Image
from synthetic_volume import GENES, SIDE, SPACING_UM, TILES
from viewer_fixtures import gallery_of, serving

from seal_extract.errors import UsageError
from seal_extract.view.collection import Collection
from seal_extract.view.volume import ShownVolume

pytest.importorskip("uvicorn")
PLANES = 6


@pytest.fixture(scope="module")
def volume_client(predicted):
    with serving(gallery_of(predicted)) as client:
        yield client


def array(out, name="0"):
    return zarr.open_array(str(next(out.glob("*.ome.zarr")) / name), mode="r")[:]


def test_the_page_is_told_lengths_in_um_planes_and_genes(volume_client):
    status, volume = volume_client.json("/api/volume")
    assert status == 200
    side_um = TILES * SIDE * 0.5
    assert volume["size_um"] == [side_um, side_um, PLANES * SPACING_UM]
    assert (volume["cells"], volume["cell_um"]) == ([TILES, TILES], [SIDE / 2, SIDE / 2])
    assert [plane["name"] for plane in volume["planes"]] == [f"P{i}" for i in range(PLANES)]
    assert [plane["problem"] for plane in volume["planes"]] == [None] * PLANES
    assert sorted(volume["genes"]) == [f"GENE{i}" for i in range(GENES)]
    assert "Nothing was measured" in " ".join(volume["notes"])


def test_a_map_has_a_code_for_each_cell_of_all_planes(volume_client, predicted):
    genes = volume_client.json("/api/volume")[1]["genes"]
    values = array(predicted)[genes.index("GENE2")]
    legend = volume_client.json("/api/volume/maps/genes/legend?of=gene2")[1]
    codes = np.frombuffer(volume_client.ask("/api/volume/maps/genes/codes?of=gene2")[2], np.uint8)
    low, high = legend["low"], legend["high"]
    assert legend["title"] == "GENE2"
    assert (low, high) == pytest.approx(tuple(np.percentile(values, (1, 99))))
    shown = low + (codes.reshape(values.shape) - 1.0) / 254 * (high - low)
    np.testing.assert_allclose(shown, values.clip(low, high), atol=(high - low) / 254)
    legend = volume_client.json("/api/volume/maps/domains/legend")[1]
    labels = array(predicted, "labels/domains/0")
    codes = np.frombuffer(volume_client.ask("/api/volume/maps/domains/codes")[2], np.uint8)
    assert np.array_equal(codes, labels.ravel())
    assert legend["counts"] == np.bincount(labels.ravel())[1:].tolist()


def test_the_picture_of_a_plane_is_its_own(volume_client, world):
    with Image.open(world[0].with_name("plane_4.png")) as plane:
        expected = np.asarray(plane)
    for size in ("picture", "slice"):
        status, headers, body = volume_client.ask(f"/api/volume/planes/4/{size}")
        assert (status, headers["Content-Type"]) == (200, "image/jpeg")
        picture = np.asarray(Image.open(io.BytesIO(body)))
        assert picture.shape == expected.shape
        assert np.abs(picture.astype(int) - expected).mean() < 8  # JPEG of noise


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("planes/6/picture", "there is no plane 6; there are 6"),
        ("planes/0/huge", "the size is 'huge'; allowed: picture, slice"),
        ("maps/genes/legend?of=GENE77", "GENE77 is not among the 8 genes"),
        ("maps/other/codes", "the map is 'other'; allowed: genes, domains"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(volume_client, address, line):
    status, answer = volume_client.json(f"/api/volume/{address}")
    assert status == 400
    assert line in answer["error"]


def test_the_planes_are_also_there_as_slides(volume_client):
    assert b"volume.js" in volume_client.ask("/")[2]
    assert b"slide.js" in volume_client.ask("/slides")[2]
    volume = volume_client.json("/api/volume")[1]
    name = volume_client.json(f"/api/slides/{volume['planes'][3]['slide']}")[1]["name"]
    assert name == volume["planes"][3]["name"] == "P3"


def test_a_run_of_slides_has_no_volume(client):
    assert b"slide.js" in client.ask("/")[2]
    status, answer = client.json("/api/volume")
    assert (status, "holds no predicted volume" in answer["error"]) == (400, True)


def test_planes_without_a_picture_are_named(predicted, world, tmp_path):
    away = world[0].parent.rename(tmp_path / "away")
    try:
        volume = ShownVolume.find(Collection.find(predicted))
        described = volume.describe()
        assert all("--slides FOLDER" in plane["problem"] for plane in described["planes"])
        assert "no picture of 6 of 6 planes (P0, P1, P2, P3, P4, ...)" in described["notes"][-1]
        found = ShownVolume.find(Collection.find(predicted, slides=away)).describe()
        assert [plane["problem"] for plane in found["planes"]] == [None] * PLANES
    finally:
        away.rename(world[0].parent)


def test_large_volumes_are_thinned_and_the_page_says_so(predicted):
    volume = ShownVolume.find(Collection.find(predicted), most_planes=3, most_cells=120)
    assert volume.cells == (3, 6, 6)
    codes = volume.map("domains", "")[1]
    assert np.array_equal(codes, array(predicted, "labels/domains/0")[::2, ::2, ::2])
    described = volume.describe()
    assert [plane["name"] for plane in described["planes"]] == ["P0", "P2", "P4"]
    assert (described["spacing_um"], described["cell_um"]) == (2 * SPACING_UM, [SIDE, SIDE])
    notes = " ".join(described["notes"])
    assert "3 of 6 planes are shown: one of 2" in notes
    assert "One of 2 × 2 patches is shown" in notes


def test_genes_that_vary_most_come_first(predicted):
    volume = ShownVolume.find(Collection.find(predicted))
    order = np.argsort(-array(predicted).reshape(GENES, -1).var(1))
    assert volume.most_varying(3) == [volume.genes[i] for i in order[:3]]
    with pytest.raises(UsageError, match="GENEX is not among the 8 genes"):
        volume.column("GENEX")

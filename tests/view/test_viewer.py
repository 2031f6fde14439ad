"""The viewer's server: what it answers, what it refuses, and that it stays up."""

import asyncio
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from cohort_fixtures import command
from PIL import Image, ImageColor
from viewer_fixtures import SLIDES, gallery_of, serving

from seal_extract import extract, open_slide, read_features
from seal_extract.errors import EncoderError, SealExtractError, UsageError
from seal_extract.run.status_table import read_status
from seal_extract.slides.cache import LruCache
from seal_extract.view.collection import Collection, SlideTiles
from seal_extract.view.gene_maps import GeneMaps
from seal_extract.view.guard import REQUEST_S
from seal_extract.view.layers import Components, cluster_layer
from seal_extract.view.viewer import make_app

pytest.importorskip("uvicorn")


def picture(body):
    picture = Image.open(io.BytesIO(body))
    return np.asarray(picture.convert("RGBA") if picture.mode == "P" else picture)


# --- what it answers ------------------------------------------------------------------------------------


def test_the_list_has_every_slide_with_what_became_of_it(client):
    status, answer = client.json("/api/slides")
    assert status == 200
    assert [s["name"] for s in answer["slides"]] == ["slide_0", "slide_1", "slide_2", "broken"]
    assert [s["status"] for s in answer["slides"]] == ["done"] * SLIDES + ["failed"]
    assert "broken.svs" in answer["slides"][3]["problem"]
    assert answer["slides"][0]["patches"] > 4
    assert picture(client.ask("/api/slides/0/thumbnail")[2]).ndim == 3


def test_a_slide_is_described_in_level_0_pixels(client, viewer_out):
    status, slide = client.json("/api/slides/0")
    assert status == 200
    assert (slide["size_l0"], slide["mpp"], slide["zooms"]) == ([1400, 1100], 0.25, 4)
    assert slide["attention"] == ["abmil, class 1", "abmil, class 2"]
    assert np.min([np.min(ring) for ring in slide["tissue"]]) >= 0
    (features,) = viewer_out.rglob("features_seal-tiny/slide_0.h5")
    xy = np.frombuffer(client.ask("/api/slides/0/patches")[2], "<i4").reshape(-1, 2)
    assert np.array_equal(xy, read_features(features).grid.xy_l0)


def test_a_tile_at_level_0_is_the_slides_own_pixels(client, drawn_slides):
    with open_slide(drawn_slides[0]) as slide:
        region = slide.read_region((512, 256), 0, (256, 256))
    status, headers, body = client.ask("/api/slides/0/tiles/0/2/1")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert np.abs(picture(body).astype(int) - region).mean() < 4  # JPEG


def test_a_tile_below_is_the_area_average_and_clear_beyond_the_edge(client, drawn_slides):
    with open_slide(drawn_slides[0]) as slide:
        region = slide.read_region((1024, 512), 0, (376, 512)).astype(float)
    tile = picture(client.ask("/api/slides/0/tiles/1/2/1")[2])
    average = region.reshape(256, 2, 188, 2, 3).mean((1, 3))
    assert np.abs(tile[:256, :188, :3] - average).mean() < 1
    assert (tile[:256, :188, 3] == 255).all()
    assert (tile[:, 188:, 3] == 0).all()


def test_a_slide_of_one_level_gives_its_coarse_tiles_from_an_overview(tmp_path):
    from synthetic_slide import write_synthetic_slide

    path = write_synthetic_slide(tmp_path / "flat.svs", (3000, 2800), downsamples=(1,), seed=1)
    with open_slide(path) as slide:
        tiles = SlideTiles(slide)
        whole = picture(tiles.tile(tiles.zooms - 1, 0, 0)[0])[:175, :187, :3].astype(float)
        region = slide.read_region((0, 0), 0, (2992, 2800)).astype(float)
    average = region.reshape(175, 16, 187, 16, 3).mean((1, 3))
    assert np.abs(whole - average).mean() < 5  # bicubic there, a box here


def test_layers_are_a_pixel_per_step_of_the_grid(client, viewer_out):
    grid = read_features(next(viewer_out.rglob("features_seal-tiny/slide_0.h5"))).grid
    for kind, of in (("embedding", ""), ("clusters", "3"), ("genes", "EPCAM"), ("attention", "1")):
        status, headers, body = client.ask(f"/api/slides/0/layers/{kind}/picture?of={of}")
        assert (status, headers["Content-Type"]) == (200, "image/png"), kind
        coloured = int((picture(body)[..., 3] > 0).sum())
        assert coloured >= len(grid), kind


def test_a_legend_says_what_the_colours_of_a_gene_and_of_several_mean(client):
    def layer(genes):
        legend, values = (f"/api/slides/0/layers/genes/{part}?of={genes}" for part in ("legend", "values"))
        return client.json(legend)[1], np.frombuffer(client.ask(values)[2], "<f4")

    legend, values = layer("epcam")
    assert (legend["title"], legend["unit"]) == ("EPCAM", "predicted log1p expression")
    assert legend["least"] == pytest.approx(values.min())
    assert legend["low"] == pytest.approx(np.percentile(values, 1), rel=1e-5)
    legend, values = layer("EPCAM,CD74:0.5")
    assert "2 genes" in legend["unit"]
    assert abs(values.mean()) < 1e-4  # standardised over the slide


def test_genes_are_suggested_and_an_unknown_one_is_told_with_its_nearest(client):
    assert client.json("/api/suggest?typed=epc")[1] == ["EPCAM"]
    assert all("A1" in name for name in client.json("/api/suggest?typed=a1")[1])
    status, answer = client.json("/api/slides/0/layers/genes/legend?of=EPCAN")
    assert status == 400
    assert "EPCAN is not among the genes of seal-tiny" in answer["error"]
    assert client.json("/api/check?typed=EPCAN")[1]["nearest"][0] == "EPCAM"
    assert client.json("/api/check?typed=EPCAM")[1] == {"why": "", "nearest": []}


def test_a_patch_has_genes_and_neighbours(client, viewer_out):
    status, patch = client.json("/api/slides/0/patches/2")
    assert status == 200
    assert len(patch["genes"]) == 12
    above = [gene["above"] for gene in patch["genes"]]
    assert above == sorted(above, reverse=True)
    assert picture(client.ask("/api/slides/0/patches/2/image")[2]).shape == (160, 160, 3)
    slides = [read_features(path) for path in sorted(viewer_out.rglob("features_seal-tiny/*.h5"))]
    query = slides[0].features[2] / np.linalg.norm(slides[0].features[2])
    cosine = [slide.features @ query / np.linalg.norm(slide.features, axis=1) for slide in slides]
    for scope, expected in (("slide", np.delete(cosine[0], 2)), ("cohort", np.concatenate(cosine[1:]))):
        alike = client.json(f"/api/slides/0/patches/2/alike?scope={scope}")[1]
        assert [a["cosine"] for a in alike] == pytest.approx(np.sort(expected)[::-1][:8], abs=1e-5)
        assert all(cosine[a["slide"]][a["row"]] == pytest.approx(a["cosine"], abs=1e-5) for a in alike)


def test_a_slide_alone_has_no_neighbours_beyond_it(slide_0, tmp_path):
    copy = tmp_path / "out" / "features_seal-tiny" / "slide_0.h5"
    copy.parent.mkdir(parents=True)
    shutil.copy(slide_0.path, copy)
    assert gallery_of(tmp_path / "out").alike(0, 1, "cohort") == []


def test_a_region_has_the_patches_whose_centre_lies_in_it(client):
    xy = np.frombuffer(client.ask("/api/slides/0/patches")[2], "<i4").reshape(-1, 2)
    half = float(np.median(xy[:, 0])) + 225
    status, answer = client.region([[0, 0], [half, 0], [half, 1100], [0, 1100]])
    assert status == 200
    assert answer["patches"] == int((xy[:, 0] + 224 < half).sum())
    assert answer["area_mm2"] == pytest.approx(half * 1100 * 0.25**2 / 1e6)
    assert len(answer["genes"]) == 20
    assert all(0 < gene["p"] <= 1 for gene in answer["genes"])
    everything = client.region([[0, 0], [1400, 0], [1400, 1100], [0, 1100]])[1]
    assert (everything["genes"], bool(everything["why"])) == ([], True)


# --- what it refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/", "/static/", "/api/slides/"])
@pytest.mark.parametrize("path", ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2fetc/image", "a.py"])
def test_no_path_reaches_the_disk(client, folder, path):
    assert client.json(folder + path) == (404, {"error": "there is nothing at this address"})


@pytest.mark.parametrize("slide", ["-1", "0x1", "%C2%B2", "9" * 5000, "0/layers/embedding/..%2f.."])
def test_a_slide_that_is_no_number_is_not_found(client, slide):
    assert client.json(f"/api/slides/{slide}") == (404, {"error": "there is nothing at this address"})


def test_a_gmt_file_cannot_be_named_as_a_gene(client, tmp_path):
    path = tmp_path / "secret.gmt"
    path.write_text("SET\tx\tEPCAM\n")
    status, answer = client.json(f"/api/slides/0/layers/genes/legend?of={path}")
    assert status == 400
    assert "is not among the genes" in answer["error"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""])
def test_other_names_than_our_own_are_refused(client, host):
    status, _, body = client.ask("/api/slides", Host=host)
    assert status == 403
    assert "this viewer answers" in json.loads(body)["error"]
    assert client.ask("/", Host=f"localhost:{client.port}")[0] == 200


PATHS = (
    *("/", "/static/slide.js", "/api/slides", "/api/genes", "/api/slides/0", "/nothing"),
    *("/api/slides/0/thumbnail", "/api/slides/0/tiles/0/0/0", "/api/slides/0/patches"),
)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "given",
    [{}, {"cookie": "={token}x"}, {"cookie": "=\u00e9"}, {"query": "wrong"}, {"query": ""}, {"cookie": '="'}],
)
def test_who_has_not_the_token_is_refused(client, path, given):
    """Every user of a machine can reach its ports."""
    cookie = f"seal_extract_{client.port}" + given.get("cookie", "").format(token=client.token)
    query = f"?token={given['query']}" if "query" in given else ""
    status, headers, body = client.ask(path + query, Cookie=cookie.encode("utf-8"))
    assert (status, headers["Set-Cookie"]) == (403, None)
    assert "open the whole address that the command printed" in json.loads(body)["error"]


def test_the_address_with_the_token_gives_a_cookie_that_serves_for_the_rest(client):
    status, headers, _ = client.ask(client.url.removeprefix(f"http://127.0.0.1:{client.port}"), Cookie="")
    assert status == 200
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert attributes == ["Path=/", "HttpOnly", "SameSite=Strict"]
    assert client.ask("/api/slides", Cookie=f"other=1; {cookie}")[0] == 200
    assert client.ask(f"/api/slides?token={client.token}", Cookie="")[0] == 200
    assert client.token not in str(client.ask("/static/slide.js")[1])


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: ", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx"]
)
def test_a_connection_that_asks_for_nothing_is_dropped(client, sent):
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as wire:
        wire.sendall(sent)
        with suppress(ConnectionResetError):
            while wire.recv(1000):  # a refusal may come before
                pass


def test_a_connection_may_be_used_again(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    ports = set()
    for wait_s in (0, REQUEST_S + 1):
        time.sleep(wait_s)
        connection.request("GET", "/api/slides", headers={"Cookie": client.cookie})
        connection.getresponse().read()
        ports.add(connection.sock.getsockname()[1])
    assert len(ports) == 1
    connection.close()


def test_other_sites_pages_are_refused(client):
    assert client.ask("/api/slides", Origin="http://evil.example")[0] == 403
    assert client.ask("/api/slides/0/thumbnail", Sec_Fetch_Site="cross-site")[0] == 403
    assert client.ask("/", Sec_Fetch_Site="cross-site")[0] == 200  # a link that was followed
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask("/api/slides", Origin=own, Sec_Fetch_Site="same-origin")[0] == 200


def test_everything_carries_a_policy_without_other_sites_or_inline_script(client):
    for path in ("/", "/api/slides", "/nothing", "/static/slide.js"):
        policy = client.ask(path)[1]["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
    page = client.ask("/")[2].decode()
    assert "style=" not in page
    assert "<script>" not in page
    assert "://" not in page


def test_malformed_regions_get_one_line(client):
    corners = ["[5]", "[NaN, 1]", "[1e300, 1]", "[1e999, 1]"]
    polygons = ["3", '"abc"', "[[1, 2], [3, 4]]", "[" * 30000, f"[{','.join(['[1,2]'] * 1001)}]"]
    polygons += [f"[[1, 2], [3, 4], {corner}]" for corner in corners]
    bodies = [f'{{"polygon": {polygon}}}'.encode() for polygon in polygons]
    for body in (b"", b"{", b"[]", b"{}", b"x" * 70_000, b"\xff\xfe", *bodies):
        status, answer = client.json("/api/slides/0/region", method="POST", body=body)
        assert status == 400, body[:40]
        assert "\n" not in answer["error"]
    assert client.ask("/api/slides")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(f"0/layers/clusters/legend?of={k}" for k in ("99", "abc")),
        *(f"0/layers/genes/legend?of={genes}" for genes in ("A" * 5000, "EPCAM:x", "EPCAM:nan")),
        *(f"0/tiles/{tile}" for tile in ("9/0/0", "0/99/0", "0/0/99")),
        *("0/layers/attention/legend?of=7", "1/layers/attention/legend?of=0", "0/layers/nothing/legend"),
        *("0/patches/9999", "0/patches/0/alike?scope=all", "99"),
    ],
)
def test_malformed_questions_get_one_line(client, path):
    status, answer = client.json(f"/api/slides/{path}")
    assert status == 400
    assert "\n" not in answer["error"]


def test_a_failed_slide_and_another_method_have_their_status(client):
    assert client.json("/api/slides/3")[0] == 422
    assert client.json("/api/slides", method="DELETE")[0] == 405


def test_nonsense_on_the_wire_leaves_it_standing(client):
    for nonsense in (b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 100_000, b"POST"):
        with socket.create_connection(("127.0.0.1", client.port)) as wire:
            wire.sendall(nonsense)
    assert client.ask("/api/slides")[0] == 200


def test_no_random_question_is_an_unexpected_failure(client):
    rng = np.random.default_rng(0)
    words = ["api", "slides", "0", "1", "3", "tiles", "patches", "layers", "genes", "clusters", "attention"]
    words += ["legend", "values", "picture", "alike", "region", "image", "%00", "..", "-1", "1e9", "%F0%9F"]
    values = ["", "2", "EPCAM", "EPCAM:0", ",", ":", "EPCAM,EPCAM", "%00", "%FF", "cohort", "9" * 30, "nan"]
    for _ in range(400):
        path = "/api/slides/0/" + "/".join(rng.choice(words, rng.integers(1, 4)))
        query = "&".join(f"{name}={rng.choice(values)}" for name in ("of", "scope", "typed", "v"))
        status, _, body = client.ask(f"{path}?{query}")
        assert status in (200, 400, 403, 404, 405, 422), (path, query, body[:200])


# --- many at once ---------------------------------------------------------------------------------------


def test_a_thousand_requests_at_once_are_answered(client):
    paths = [f"/api/slides/{i % SLIDES}/tiles/{i % 3}/{i % 2}/0" for i in range(1000)]

    host = f"Host: 127.0.0.1:{client.port}\r\nCookie: {client.cookie}\r\n"

    async def one(path):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        writer.write(f"GET {path} HTTP/1.1\r\n{host}Connection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer[:12]

    async def all_at_once():
        return await asyncio.gather(*map(one, paths))

    assert set(asyncio.run(all_at_once())) == {b"HTTP/1.1 200"}
    assert client.ask("/api/slides")[0] == 200


def test_who_has_left_is_not_worked_for(viewer_out, monkeypatch):
    gallery = gallery_of(viewer_out)
    made, go = [], threading.Event()

    def slow(index, zoom, column, row):
        made.append(column)
        go.wait(30)
        return b"", "image/jpeg"

    monkeypatch.setattr(gallery, "tile", slow)
    with serving(gallery) as client:
        wires, host = [], f"Host: 127.0.0.1:{client.port}\r\nCookie: {client.cookie}\r\n"
        for i in range(40):
            wires.append(socket.create_connection(("127.0.0.1", client.port)))
            wires[-1].sendall(f"GET /api/slides/0/tiles/0/{i}/0 HTTP/1.1\r\n{host}\r\n".encode())
        while len(made) < 2:
            time.sleep(0.01)
        for wire in wires:
            wire.close()
        time.sleep(0.5)
        go.set()
        assert client.ask("/api/slides")[0] == 200
    assert len(made) <= 4  # those that had begun


def test_a_cache_keeps_to_its_size_and_makes_nothing_twice_at_once():
    cache = LruCache(100, len)
    for i in range(50):
        cache.get(i, lambda: b"x" * 10)
    assert cache.filled == 100
    made = []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.get("one", lambda: made.append(1) or b"y"), range(64)))
    assert made == [1]


def test_what_could_not_be_made_is_tried_again():
    cache = LruCache(10)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 / 0)
    assert cache.get("a", lambda: 5) == 5


# --- which folder ---------------------------------------------------------------------------------------


def test_folders_that_cannot_be_meant_are_refused(tmp_path, viewer_out):
    with pytest.raises(UsageError, match="no folder"):
        Collection.find(tmp_path / "missing")
    with pytest.raises(UsageError, match="holds no finished features file"):
        Collection.find(tmp_path)
    with pytest.raises(UsageError, match="allowed: --encoder seal-tiny"):
        Collection.find(viewer_out, "conch")
    with pytest.raises(UsageError, match="--slides is"):
        Collection.find(viewer_out, slides=tmp_path / "missing")


def test_several_encoders_have_to_be_chosen_from(tmp_path, drawn_slides, encoder, tiny):
    for one in (encoder, tiny):
        extract(drawn_slides[0], one, tmp_path / "out")
    with pytest.raises(UsageError, match="type --encoder"):
        Collection.find(tmp_path / "out")
    assert len(Collection.find(tmp_path / "out", "seal-tiny").slides) == 1


def test_a_slide_that_moved_is_listed_and_found_in_another_folder(tmp_path, tiny, drawn_slides):
    source = tmp_path / "before"
    source.mkdir()
    os.link(drawn_slides[0], source / "slide.svs")
    extract(source / "slide.svs", tiny, tmp_path / "out")
    assert read_status(tmp_path / "out" / "status.csv") == {}
    shutil.move(source, tmp_path / "after")
    (moved,) = Collection.find(tmp_path / "out").slides
    assert "--slides FOLDER" in moved.problem
    with pytest.raises(SealExtractError, match="not there any more"):
        moved.open()
    (found,) = Collection.find(tmp_path / "out", slides=tmp_path / "after").slides
    assert found.problem is None
    with found.open() as slide:
        assert slide.size_l0 == (1400, 1100)
    with serving(gallery_of(tmp_path / "out")) as client:
        assert client.json("/api/slides")[1]["slides"][0]["problem"]
        assert client.json("/api/slides/0")[0] == 422


def test_an_encoder_without_decoder_or_names_says_so():
    def without():
        raise EncoderError("uni has no expression decoder")

    genes = GeneMaps(without)
    why = "uni has no expression decoder"
    assert genes.state() == {"named": False, "why": why, "count": 0, "signatures": []}
    with pytest.raises(EncoderError, match="no expression decoder"):
        genes.suggest("A")


# --- colours, neighbours, effects -----------------------------------------------------------------------


def test_clusters_find_groups_the_largest_first_along_the_components_of_the_sample():
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 40)).astype(np.float32) * 5
    group = np.repeat([0, 1, 2], [60, 40, 20])
    rows = centres[group] + rng.standard_normal((120, 40)).astype(np.float32) * 0.1
    components = Components.of(rows)
    exact = np.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
    assert np.abs(np.abs((exact * components.axes[:, :2].T).sum(1)) - 1).max() < 1e-4
    for _ in range(2):  # the same each time
        assert np.array_equal(cluster_layer(components, rows, 3, slides=1).values, group)
    with pytest.raises(UsageError, match="allowed: 2 to 12"):
        cluster_layer(components, rows, 13, slides=1)


def test_embeddings_narrower_than_three_still_have_colours():
    rows = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    assert Components.of(rows).rgb(rows).shape == (10, 3)
    assert Components.of(rows[:1]).rgb(rows[:1]).shape == (1, 3)


def test_cluster_colours_differ():
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    rgb = [ImageColor.getrgb(c) for c in cluster_layer(Components.of(rows), rows, 12, 1).legend["colours"]]
    lab = cv2.cvtColor(np.array([rgb], np.float32) / 255, cv2.COLOR_RGB2Lab)[0]
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(12)
    assert apart.min() > 30


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_its_address_and_ends_on_ctrl_c(viewer_out):
    started = subprocess.Popen(
        command("view", viewer_out, "--no-browser"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    line = started.stdout.readline()
    assert "4 slides" in line
    address = re.search(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", line)[0]
    with urlopen(address, timeout=30) as page:
        assert page.status == 200
    with pytest.raises(HTTPError, match="403"):
        urlopen(address.partition("?")[0], timeout=30)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=30)
    assert (started.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "xstatic"])
def test_without_the_extra_one_line_says_what_to_install(viewer_out, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r'pip install "\.\[view\]"'):
        make_app(gallery_of(viewer_out), 1, "token")


def test_a_port_in_use_is_told_in_a_line(viewer_out):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            command("view", viewer_out, "--no-browser", "--port", port), capture_output=True, text=True
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "type another --port" in done.stderr

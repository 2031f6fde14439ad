"""A small finished run, the report of a slide of it, a viewer of it in a thread, and a browser."""

import base64
import http.client
import json
import os
import re
import shutil
import threading
import time
from contextlib import closing, contextmanager
from html.parser import HTMLParser

import h5py
import numpy as np
import pytest

from seal_extract.run.options import ExtractOptions

SLIDES = 3  # finished ones; a fourth fails
WAIT_S = 60  # for the page


@pytest.fixture(scope="session")
def viewer_out(tmp_path_factory, drawn_slides):
    """Three slides by seal-tiny, one that failed, and attention over the first."""
    from seal_extract import extract_cohort, load_encoder

    root = tmp_path_factory.mktemp("viewed")
    slides, out = root / "slides", root / "out"
    slides.mkdir()
    for i, path in enumerate(drawn_slides):
        os.link(path, slides / f"slide_{i}.svs")
    (slides / "broken.svs").write_bytes(b"II*\0" + bytes(100))
    options = ExtractOptions(overlap_px=112, workers=1)
    extract_cohort([slides], load_encoder("seal-tiny", device="cpu"), out, options=options)
    write_attention(out)
    return out


def write_attention(out):
    """A slide-level file beside the features of slide_0: the weights grow from patch to patch."""
    (features,) = out.rglob("features_seal-tiny/slide_0.h5")
    path = features.parent.parent / "slide_features_abmil" / "slide_0.h5"
    path.parent.mkdir()
    with h5py.File(features) as source, h5py.File(path, "w") as file:
        source.copy("coords", file)
        n = len(source["coords"])
        file["attention"] = np.linspace(1, 2, n, dtype=np.float32)[None].repeat(2, 0) / n


# --- a report -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def slide_0(viewer_out):
    """Features of slide_0, which has an outline, and attention in two classes."""
    from seal_extract import read_features

    return read_features(next(viewer_out.rglob("features_seal-tiny/slide_0.h5")))


@pytest.fixture(scope="session")
def slide_report(slide_0, decoder, tmp_path_factory):
    """The report of slide_0, with a signature whose name looks like markup."""
    from seal_extract.genes.gene_lists import Signature

    path = tmp_path_factory.mktemp("report") / "deep" / "slide.html"
    return write_report(slide_0, path, decoder, signatures=[Signature("Epithelium <b>", EPITHELIUM)])


EPITHELIUM = {"EPCAM": 1.0, "KRT8": 1.0}


def write_report(features, path, decoder, **options):
    """As the command does it."""
    from seal_extract.features.store import open_origin
    from seal_extract.view.report import write_slide_report

    with closing(open_origin(features)) as slide:
        return write_slide_report(features, path, slide=slide, decoder=decoder, **options)


def data_of(path):
    """The data that a report's script reads."""
    html = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def numbers(packed):
    """Numbers of a layer in a report."""
    return np.frombuffer(base64.b64decode(packed["base64"]), f"<{packed['type']}")


class Tags(HTMLParser):
    """All tags of a page with their attributes, the text of its scripts, and the rest of its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.texts, self.inside = [], [], [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


# --- a viewer -------------------------------------------------------------------------------------


def gallery_of(out, *, encoder=None, slides=None, panel=None, signatures=None):
    """As the command makes it."""
    from seal_extract.genes.decoder import decoder_of
    from seal_extract.view.collection import Collection
    from seal_extract.view.gallery import Gallery
    from seal_extract.view.gene_maps import GeneMaps

    collection = Collection.find(out, encoder, slides)
    provenance = next(s.provenance for s in collection.slides if s.provenance)
    return Gallery(collection, GeneMaps(lambda: decoder_of(provenance, panel=panel), signatures))


class Client:
    """Asks the server as a browser would, or as one should not."""

    token = "the-token-of-this-viewer"

    def __init__(self, port):
        self.port = port
        self.url = f"http://127.0.0.1:{port}/?token={self.token}"
        self.cookie = f"seal_extract_{port}={self.token}"

    def ask(self, path, method="GET", body=None, **headers):
        """Status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Cookie": self.cookie} | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path, **how):
        """Status and JSON."""
        status, _, body = self.ask(path, **how)
        return status, json.loads(body)

    def region(self, polygon, slide=0):
        return self.json(f"/api/slides/{slide}/region", method="POST", body=json.dumps({"polygon": polygon}))


@contextmanager
def serving(gallery):
    """A server in a thread, until the block ends."""
    from seal_extract.view.viewer import listen, make_server

    with listen(0) as sock:
        port = sock.getsockname()[1]
        server = make_server(gallery, sock, Client.token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Client(port)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def client(viewer_out):
    """A server over `viewer_out`."""
    with serving(gallery_of(viewer_out)) as client:
        yield client


# --- a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium():
    """A browser without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not (chromium and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1300,900"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """What one does with the page, and sees of it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, url):
        self.driver.get("about:blank")
        self.console()  # of the page before
        self.driver.get(url)
        self.until(
            "const i = document.querySelector('.slide-tile.leaflet-tile-loaded, .slide-picture');"
            "return i && i.naturalWidth > 0"
        )

    def until(self, script):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda d: d.execute_script(script))

    def look(self, script):
        return self.driver.execute_script(f"return {script}")

    def text(self, selector):
        return self.look(f"document.querySelector({selector!r}).innerText")

    def click(self, selector):
        self.driver.find_element("css selector", selector).click()

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def until_text(self, selector, part):
        self.until(f"return document.querySelector({selector!r}).innerText.includes({part!r})")

    def click_map(self, x, y):
        """A click at a share of the map's width and height."""
        from selenium.webdriver import ActionChains

        box = self.driver.find_element("id", "map")
        across, down = (x - 0.5) * box.size["width"], (y - 0.5) * box.size["height"]
        ActionChains(self.driver).move_to_element_with_offset(
            box, round(across), round(down)
        ).click().perform()

    def saved(self, folder, act):
        """The one file that an action has the browser save."""
        folder.mkdir()
        where = {"behavior": "allow", "downloadPath": str(folder)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
        act()
        deadline = time.monotonic() + WAIT_S
        while not (done := [p for p in folder.iterdir() if p.suffix != ".crdownload" and p.stat().st_size]):
            assert time.monotonic() < deadline, "nothing was saved"
            time.sleep(0.05)
        return done[0]

    def legend_hides_nothing(self):
        """Whether the middle of every part of the map but scale and zoom belongs to the map."""
        return self.look(
            "(() => { const b = document.getElementById('map').getBoundingClientRect();"
            "return [0.1, 0.3, 0.5, 0.7].every(y => [0.05, 0.2, 0.5, 0.8].every(x =>"
            "document.elementFromPoint(b.left + x * b.width, b.top + y * b.height).closest('#map'))) })()"
        )

    def painted(self):
        """Whether the picture of colours has loaded, with its pixels as they are."""
        self.until("const i = document.querySelector('img.pixels'); return i && i.naturalWidth > 0")
        return self.look("getComputedStyle(document.querySelector('img.pixels')).imageRendering")

    def console(self):
        """What the page said; not what the driver of a browser without a GPU says of its speed."""
        entries = self.driver.get_log("browser")
        return [one for one in entries if one["level"] != "DEBUG" and one["source"] != "rendering"]

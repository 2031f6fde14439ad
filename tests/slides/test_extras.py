"""Readers of optional libraries and of plugins.

No free file of iSyntax, KFB or VSI was at hand, and nobody writes them: imitations of their libraries stand
in. CZI files are written by pylibCZIrw.
"""

import re
import subprocess
import sys
import types
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from cohort_fixtures import draw_slides, run_here
from czi_files import for_openslide, to_jpeg_xr, write_czi
from PIL import Image
from zarr_stores import halved

from seal_extract import open_slide, plugins
from seal_extract.errors import ReadError, ResolutionError, SlideOpenError, UnsupportedSlideError
from seal_extract.slides import extras
from seal_extract.slides.entry import file_stamp
from seal_extract.slides.listing import list_slides

GUIDE = Path(__file__).parents[2] / "examples" / "README.md"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.czi", r'pylibCZIrw reads it; .*pip install "\.\[czi\]"'),
        ("a.isyntax", r'pyisyntax reads it; .*pip install "\.\[isyntax\]"'),
        ("a.kfb", r'kfbslide reads it; .*pip install "\.\[kfb\]"'),
        ("a.vsi", r'slideio reads it; .*pip install "\.\[vsi\]"'),
    ],
)
def test_a_file_that_needs_an_extra_says_which(tmp_path, monkeypatch, name, words):
    for reader in extras.EXTRAS:
        monkeypatch.setitem(sys.modules, reader.library[0], None)
    (tmp_path / name).write_bytes(b"some header")
    assert [entry.path.name for entry in list_slides([tmp_path]).entries] == [name]
    done = run_here(tmp_path / name, "--dry-run", "--plan-timeout", 0)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(f"{name}: OpenSlide .*; {words}", line), line


class Imitation:
    """What the libraries of iSyntax and KFB have in common: three levels of noise."""

    mpp_x = mpp_y = 0.25
    properties = types.MappingProxyType({"openslide.mpp-x": "0.25"})
    level_downsamples = (1, 2, 4)

    def __init__(self, path):
        if Path(path).read_bytes() == b"damaged":
            raise RuntimeError("no such\nheader")
        self.levels = halved(np.random.default_rng(0).integers(0, 256, (300, 400, 4), np.uint8)[..., :3])
        self.level_dimensions = [pixels.shape[1::-1] for pixels in self.levels]
        self.is_closed = False

    def region(self, x, y, width, height, level):
        pixels = self.levels[level][y : y + height, x : x + width]
        assert pixels.shape[:2] == (height, width), "asked for pixels outside"
        if level == 2:
            raise RuntimeError("lost\nsector")
        alpha = np.full(pixels.shape[:2], 255, np.uint8)
        alpha[pixels[..., 0] == 0] = 0  # never scanned
        return np.dstack([pixels, alpha])

    def close(self):
        self.is_closed = True


class ISyntax(Imitation):
    open = classmethod(lambda cls, path: cls(path))
    read_region = Imitation.region


class OpenSlide(Imitation):
    def read_region(self, xy_l0, level, size_px):
        x, y = (v // self.level_downsamples[level] for v in xy_l0)
        return Image.fromarray(self.region(x, y, *size_px, level))


class Scene(Imitation):
    """An image of slideio, which is asked for the channels by their number."""

    num_channels, num_z_slices, num_t_frames, num_zoom_levels = 3, 1, 1, 3
    resolution = property(lambda self: (self.mpp_x * 1e-6, self.mpp_y * 1e-6))

    def get_channel_data_type(self, channel):
        return np.uint8

    def get_zoom_level_info(self, level):
        width, height = self.level_dimensions[level]
        size = types.SimpleNamespace(width=width, height=height)
        return types.SimpleNamespace(size=size, scale=1 / self.level_downsamples[level])

    def read_block_from_level(self, level, rect):
        pixels = self.region(*rect, level)
        return np.where(pixels[..., 3:] > 0, pixels, 0)[..., :3]


def open_vsi(path, driver):
    assert driver == "VSI"
    scene = Scene(path)
    slide = types.SimpleNamespace(num_scenes=1, get_scene=lambda i: scene, close=scene.close)
    vars(slide)["levels"] = scene.levels
    return slide


def test_a_vsi_that_is_not_one_rgb_image_is_refused(tmp_path, monkeypatch):
    library = types.SimpleNamespace(open_slide=open_vsi)
    monkeypatch.setitem(sys.modules, "slideio", library)
    monkeypatch.setattr(extras, "version", lambda package: "1.0")
    (tmp_path / "a.vsi").write_bytes(b"fine")
    monkeypatch.setattr(Scene, "num_channels", 1)
    with pytest.raises(UnsupportedSlideError, match="1 channels of uint8 in 1 planes"):
        open_slide(tmp_path / "a.vsi")
    two = types.SimpleNamespace(num_scenes=2, close=lambda: None)
    monkeypatch.setattr(library, "open_slide", lambda *_: two)
    with pytest.raises(UnsupportedSlideError, match="it holds 2 scenes"):
        open_slide(tmp_path / "a.vsi")


def test_the_folder_of_a_vsi_is_part_of_it(tmp_path):
    pixels = tmp_path / "_a_" / "stack1" / "frame_t.ets"
    pixels.parent.mkdir(parents=True)
    pixels.write_bytes(b"pixels")
    (pixels.parent / "no_slide.png").write_bytes(b"part of it")
    slide = tmp_path / "a.vsi"
    slide.write_bytes(b"fine")
    assert [entry.path for entry in list_slides([tmp_path]).entries] == [slide]
    before = file_stamp(slide)
    pixels.write_bytes(b"others")
    assert file_stamp(slide) != before


@pytest.mark.parametrize("name", ["a.isyntax", "a.kfb", "a.vsi"])
def test_a_library_of_an_extra_is_asked_for_what_it_has(tmp_path, monkeypatch, name):
    library = types.SimpleNamespace(ISyntax=ISyntax, OpenSlide=OpenSlide)
    monkeypatch.setitem(sys.modules, "isyntax", library)
    monkeypatch.setitem(sys.modules, "kfbslide", library)
    monkeypatch.setitem(sys.modules, "slideio", types.SimpleNamespace(open_slide=open_vsi))
    monkeypatch.setattr(extras, "version", lambda package: "1.0")
    (tmp_path / name).write_bytes(b"fine")
    with open_slide(tmp_path / name) as slide:
        assert (slide.mpp, slide.size_l0) == (0.25, (400, 300))
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        pixels = slide._handle.levels
        seen = np.where(pixels[0][..., :1] == 0, 0, pixels[0])
        assert np.array_equal(slide.read_region((0, 0), 0, (400, 300)), seen)
        region = slide.read_region((-20, 100), 1, (230, 150))
        assert np.array_equal(region[:100, 10:210], np.where(pixels[1][50:, :, :1] == 0, 0, pixels[1][50:]))
        assert not region[:, :10].any()
        assert not region[100:].any()
        assert not region[:, 210:].any()
        with pytest.raises(ReadError, match=r"cannot read 5 x 5 px of level 2 .*lost sector"):
            slide.read_region((0, 0), 2, (5, 5))
    assert getattr(slide, "_scene", slide._handle).is_closed
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(SlideOpenError, match="no such header"):
        open_slide(tmp_path / name)
    (tmp_path / name).write_bytes(b"fine")
    monkeypatch.setattr(Imitation, "mpp_x", 0.0)
    monkeypatch.setattr(Imitation, "properties", {})
    with pytest.raises(ResolutionError, match=r"gives 0 µm/px, which cannot be true|does not say how"):
        open_slide(tmp_path / name)
    with open_slide(tmp_path / name, mpp=0.5) as slide:
        assert slide.mpp == 0.5


# --- CZI --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    with open_slide(draw_slides(tmp_path_factory.mktemp("drawn"), 1)[0]) as slide:
        return slide.read_region((0, 0), 0, (900, 700))


def test_a_czi_that_openslide_refuses_is_read(pixels, tmp_path):
    with open_slide(write_czi(tmp_path / "a.czi", [(-50, 30, pixels)])) as slide:
        assert slide.reader.startswith("pylibCZIrw ")
        assert (slide.size_l0, slide.mpp, slide.mpp_source) == ((900, 700), 0.5, "CZI Scaling")
        assert np.array_equal(slide.read_region((0, 0), 0, (900, 700)), pixels)
        region = slide.read_region((-10, 690), 0, (50, 50))
        assert np.array_equal(region[:10, 10:], pixels[690:, :40])
        assert not region[10:].any()


@pytest.mark.parametrize("compression", ["uncompressed:", "zstd0:ExplicitLevel=1", "zstd1:ExplicitLevel=1"])
def test_a_czi_that_openslide_reads_is_left_to_it(pixels, tmp_path, compression):
    path = for_openslide(write_czi(tmp_path / "a.czi", [(0, 0, pixels)], compression=compression))
    with open_slide(path) as slide:
        assert slide.reader.startswith("openslide ")
        assert (slide.size_l0, slide.mpp) == ((900, 700), 0.5)
        assert np.array_equal(slide.read_region((0, 0), 0, (900, 700)), pixels)


def test_jpeg_xr_needs_the_extra(pixels, tmp_path, monkeypatch):
    path = write_czi(tmp_path / "a.czi", [(0, 0, pixels)], compression="uncompressed:")
    for_openslide(to_jpeg_xr(path))
    monkeypatch.setitem(sys.modules, "pylibCZIrw.czi", None)
    with pytest.raises(SlideOpenError, match=r"JPEG XR compression is not supported; pylibCZIrw reads"):
        open_slide(path)


def test_jpeg_xr_is_read_and_patches_are_cut(pixels, tmp_path):
    path = write_czi(tmp_path / "a.czi", [(0, 0, pixels)], compression="uncompressed:")
    with open_slide(to_jpeg_xr(path)) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (900, 700)), pixels)
    done = run_here(path, "-o", tmp_path / "out", "--encoder", "seal-tiny")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").rglob("features_*/a.h5"))) == 1


def test_scenes_are_one_slide_unless_they_overlap(pixels, tmp_path):
    path = write_czi(tmp_path / "a.czi", [(0, 0, pixels), (1000, 0, pixels)])
    with pytest.warns(UserWarning, match="its 2 scenes are read as one slide"):
        slide = open_slide(path)
    with slide:
        assert slide.size_l0 == (1900, 700)
        assert np.array_equal(slide.read_region((1000, 0), 0, (900, 700)), pixels)
        assert not slide.read_region((900, 0), 0, (100, 700)).any()
    path = write_czi(tmp_path / "b.czi", [(0, 0, pixels), (600, 0, pixels)])
    with pytest.raises(UnsupportedSlideError, match="of its 2 scenes some overlap"):
        open_slide(path)


def test_a_czi_that_is_no_brightfield_or_has_no_scale_is_refused(pixels, tmp_path):
    grey = write_czi(tmp_path / "a.czi", [(0, 0, pixels[..., :1].astype(np.uint16))])
    with pytest.raises(UnsupportedSlideError, match=r"1 channels of Gray16, not one of Bgr24"):
        open_slide(grey)
    with pytest.raises(ResolutionError, match=r"CZI Scaling gives 500 µm/px"):
        open_slide(write_czi(tmp_path / "b.czi", [(0, 0, pixels)], mpp=500))
    (tmp_path / "b.czi").write_bytes((tmp_path / "b.czi").read_bytes()[:3000])
    with pytest.raises(SlideOpenError, match=r"b\.czi: .*pylibCZIrw"):
        open_slide(tmp_path / "b.czi")


# --- plugins ----------------------------------------------------------------------------------------------


def test_the_reader_of_the_guide_works_when_it_is_installed(pixels, tmp_path):
    """As pip would leave it, in a process of its own: the slide is listed, opened and cut."""
    (code,) = re.findall(r"```python\n(.*?class NpyReader.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    (toml,) = re.findall(r'readers"\]\n(ours = .*?)```', GUIDE.read_text(encoding="utf-8"), re.S)
    info = tmp_path / "our_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: our-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[seal_extract.readers]\n" + toml.replace('"', ""))
    (tmp_path / "our_package.py").write_text(code)
    (tmp_path / "slides").mkdir()
    np.save(tmp_path / "slides" / "a.npy", pixels)
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
    command = (
        f"from seal_extract.cli import main; sys.exit(main([{str(tmp_path / 'slides')!r}, '--dry-run']))"
    )
    done = subprocess.run([sys.executable, "-c", start + command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"a\.npy +900 x 700 +0\.5 +our header", done.stdout), done.stdout


class Raising:
    suffixes = (".Abc",)

    def __init__(self, path, mpp):
        raise KeyError("no\nheader")


class Other(Raising):
    pass


def without_suffixes(path, mpp):
    pass


@pytest.fixture
def install(monkeypatch):
    def entries(**values):
        found = [EntryPoint(n, f"{__name__}:{v}", extras.GROUP) for n, v in values.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: found)
        extras.plugin_readers.cache_clear()

    yield entries
    monkeypatch.undo()
    extras.plugin_readers.cache_clear()


def test_a_plugin_that_fails_is_named_and_costs_no_other(install, tmp_path):
    install(a="without_suffixes", b="nothing", c="Raising", d="Other")
    (tmp_path / "a.abc").write_bytes(b"x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list_slides([tmp_path])) == len(list_slides([tmp_path])) == 1
    messages = [re.sub(r" of unknown package \(.*?\)", "", str(w.message)) for w in caught]
    assert messages == [
        "plugin a: it is left out: AttributeError: 'function' object has no attribute 'suffixes'",
        f"plugin b: it is left out: AttributeError: module '{__name__}' has no attribute 'nothing'",
        "plugin d: another plugin reads .abc",
    ]
    with pytest.raises(SlideOpenError, match=r"the plugin for \.abc: KeyError: 'no\\nheader'") as refused:
        open_slide(tmp_path / "a.abc")
    assert "\n" not in str(refused.value)

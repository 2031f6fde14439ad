"""Which slide a file is: another one never counts as finished, the same one does wherever it lies."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest
import tifffile
from conftest import shared

from seal_extract import ExtractOptions, extract
from seal_extract.errors import OutputError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.job import SlideJob
from seal_extract.run.provenance import find_finished
from seal_extract.slides.entry import SlideEntry, content, file_stamp, sizes_and_times, slide_files

MB = 2**20


def draw(path, seed, tissue=(300, 900)):
    """An uncompressed scan, white but for a square of tissue: all of them have one size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((1792, 1792, 3), 255, np.uint8)
    rows = np.random.default_rng(seed).integers(90, 190, (tissue[1] - tissue[0], 1200, 3))
    pixels[tissue[0] : tissue[1], 200:1400] = rows.astype(np.uint8) * np.array([1, 0.6, 1])
    per_cm = (20_000, 20_000)
    tifffile.imwrite(path, pixels, tile=(256, 256), resolution=per_cm, resolutionunit="CENTIMETER")
    return path


def without_content(path):
    """What an older version wrote."""
    with h5py.File(path, "r+") as file:
        provenance = json.loads(file.attrs["seal_extract"])
        del provenance["request"]["slide"]["content"], provenance["slide"]["stamp"]
        file.attrs["seal_extract"] = json.dumps(provenance)


@pytest.fixture
def done(encoder, tmp_path):
    slide = draw(tmp_path / "a/slide.tiff", 1)
    return slide, extract(slide, encoder, tmp_path / "out").path, tmp_path / "out"


def refused(slide, encoder, out):
    """Why the slide is not done, to both ways of asking."""
    report = extract_cohort(slide, encoder, out)
    with pytest.raises(OutputError) as caught:
        extract(slide, encoder, out)
    assert [row.reason for row in report.rows] == [str(caught.value)]
    return str(caught.value)


def test_another_slide_of_one_name_and_size_is_not_finished(done, encoder, tmp_path):
    slide, path, out = done
    other = draw(tmp_path / "b/slide.tiff", 2)
    assert other.stat().st_size == slide.stat().st_size > 8 * MB
    os.utime(other, ns=(slide.stat().st_atime_ns, slide.stat().st_mtime_ns))
    assert refused(other, encoder, out) == (
        f"{path} exists, made of {slide} (a slide with other content); "
        "type --overwrite to replace it, or another -o"
    )


def test_a_slide_replaced_in_its_place_is_not_finished(done, encoder):
    slide, _, out = done
    draw(slide, 2)
    assert "(a slide with other content)" in refused(slide, encoder, out)


def recognised(slide, encoder, out):
    return find_finished(SlideJob.of(SlideEntry.of(slide), out, ExtractOptions()), encoder)


def test_a_slide_that_was_moved_copied_or_touched_is_finished(done, encoder, tmp_path):
    slide, path, out = done
    copy = tmp_path / "copy/slide.tiff"
    copy.parent.mkdir()
    shutil.copyfile(slide, copy)
    slide.touch()
    for place in (slide, copy):
        assert recognised(place, encoder, out).path == path
        assert extract(place, encoder, out).path == path


def test_an_older_version_s_file_is_finished_in_its_place_alone(done, encoder, tmp_path):
    slide, path, out = done
    without_content(path)
    assert recognised(slide, encoder, out).path == path
    assert extract(slide, encoder, out).path == path
    moved = tmp_path / "moved/slide.tiff"
    moved.parent.mkdir()
    shutil.copy2(slide, moved)
    assert "(by an older version)" in refused(moved, encoder, out)
    slide.touch()
    assert "(by an older version)" in refused(slide, encoder, out)


def test_an_older_version_s_file_is_finished_for_a_staged_slide(done, encoder, tmp_path):
    slide, path, out = done
    without_content(path)
    options = ExtractOptions(stage_dir=tmp_path / "stage")
    (row,) = extract_cohort(slide, encoder, out, options=options).rows
    assert row.status == "done"
    assert extract(slide, encoder, out, options=options).path == path


# --- slides of several files ------------------------------------------------------------------


def vms(folder):
    folder.mkdir()
    names = ["ImageFile=s.jpg", "ImageFile(1,0)=s(1,0).jpg\r", "MapFile = s_map.jpg", "Other=no.jpg"]
    names.append("Elsewhere=../secret.jpg")
    (folder / "s.vms").write_text("\n".join(["[Virtual Microscope Specimen]", *names]))
    for name in ("s.jpg", "s(1,0).jpg", "s_map.jpg"):
        (folder / name).write_bytes(name.encode() * 100)
    (folder.parent / "secret.jpg").touch()
    return folder / "s.vms", {"s.jpg", "s(1,0).jpg", "s_map.jpg"}


def mrxs(folder):
    (folder / "s").mkdir(parents=True)
    (folder / "s.mrxs").write_bytes(b"a thumbnail")
    for name in ("Slidedat.ini", "Data0000.dat"):
        (folder / "s" / name).write_bytes(name.encode() * 100)
    return folder / "s.mrxs", {"Slidedat.ini", "Data0000.dat"}


def dicom(folder):
    folder.mkdir()
    for name, series in (("0.dcm", "1.2.3"), ("1.dcm", "1.2.3"), ("2.dcm", "1.2.4")):
        number = series.encode()
        element = b"\x20\x00\x0e\x00UI" + len(number).to_bytes(2, "little") + number + b"\x00"
        (folder / name).write_bytes(bytes(128) + b"DICM" + element + name.encode() * 100)
    return folder / "0.dcm", {"1.dcm"}


@pytest.mark.parametrize("make", [vms, mrxs, dicom])
def test_a_slide_of_several_files_is_all_of_them(tmp_path, make):
    path, others = make(tmp_path / "slide")
    first, *rest = slide_files(path)
    assert first == path
    assert {p.name for p in rest} == others
    before = [f(path) for f in (file_stamp, sizes_and_times, content)]
    copied = shutil.copytree(path.parent, tmp_path / "copy") / path.name
    assert [f(copied) for f in (sizes_and_times, content)] == before[1:]
    part = rest[0]
    part.write_bytes(part.read_bytes()[::-1])
    assert all(f(path) != old for f, old in zip((file_stamp, sizes_and_times, content), before, strict=True))


def test_the_files_of_a_real_dicom_slide(tmp_path):
    files = [shared("data", "wsi", f"openslide-python_boxes_{i}.dcm") for i in (0, 1)]
    (tmp_path / "other.dcm").write_bytes(b"no DICOM")
    copies = [shutil.copy(file, tmp_path) for file in files]
    assert [str(p) for p in slide_files(tmp_path / files[0].name)] == [str(c) for c in copies]


def test_large_files_are_told_apart_by_head_tail_and_samples(tmp_path):
    path, rng = tmp_path / "a.svs", np.random.default_rng(0)
    path.write_bytes(rng.bytes(40 * MB))
    seen = {content(path)}
    for at, length in ((0, 1), (40 * MB - 1, 1), (11 * MB, 2 * MB)):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(rng.bytes(length))
        seen.add(content(path))
    assert len(seen) == 4

"""Files, folders, patterns and tables become one list in which every slide has a name of its own."""

from pathlib import Path

import pytest
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_extract.errors import UsageError
from seal_extract.names import choose_names
from seal_extract.slides.entry import SlideEntry
from seal_extract.slides.listing import list_slides


@pytest.fixture
def tree(tmp_path):
    def plant(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return plant


def names(slides):
    return {str(entry.path.name): entry.name for entry in slides.entries}


# --- folders ----------------------------------------------------------------------------------


def test_folders_are_searched_to_the_bottom_in_order(tree):
    folder = tree("b/2.svs", "a/deep/er/1.ndpi", "3.tiff", ".hidden.svs", ".trash/4.svs")
    found = [entry.path.relative_to(folder).as_posix() for entry in list_slides([folder]).entries]
    assert found == ["3.tiff", "a/deep/er/1.ndpi", "b/2.svs"]


def test_what_is_no_slide_is_listed_with_the_reason(tree):
    folder = tree("1.svs", "1.xml", "README")
    assert list_slides([folder]).ignored == (
        (folder / "1.xml", ".xml is no slide"),
        (folder / "README", "no suffix is no slide"),
    )


def test_the_inside_of_a_slide_of_many_files_is_no_slide(tree):
    folder = tree("m.mrxs", "m/Slidedat.ini", "m/Data0001.jpg", "v/s.vms", "v/s(0,0).jpg")
    slides = list_slides([folder])
    assert [entry.path.name for entry in slides.entries] == ["m.mrxs", "s.vms"]
    assert slides.ignored == ((folder / "v/s(0,0).jpg", "part of the VMS slide beside it"),)


def test_the_files_of_one_dicom_slide_are_one_slide(tmp_path):
    for i in (0, 1):
        source = shared(f"data/wsi/openslide-python_boxes_{i}.dcm")
        (tmp_path / f"{i}.dcm").write_bytes(source.read_bytes())
    slides = list_slides([tmp_path])
    assert names(slides) == {"0.dcm": "0"}
    assert slides.ignored == ((tmp_path / "1.dcm", "of the same DICOM slide as 0.dcm"),)


def test_links_are_followed_but_in_no_circle(tree, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "1.svs").touch()
    folder = tree("2.svs")
    (folder / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert sorted(entry.path.name for entry in list_slides([folder]).entries) == ["1.svs", "2.svs"]


def test_a_pattern_chooses_among_folders(tree):
    folder = tree("site_a/1.svs", "site_b/2.svs", "other/3.svs", "site_a/notes.txt")
    slides = list_slides([folder / "site_*" / "*"])
    assert names(slides) == {"1.svs": "1", "2.svs": "2"}
    assert [reason for _, reason in slides.ignored] == [".txt is no slide"]


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("alone.svs", "a/x/s.svs", "b/x/s.svs", "b/y/s.svs"), ["alone", "a__x__s", "b__x__s", "y__s"]),
        (("c.ndpi", "c.svs"), ["c.ndpi", "c.svs"]),
    ],
)
def test_same_stems_are_kept_apart_by_folders_or_suffix(tree, files, expected):
    assert [entry.name for entry in list_slides([tree(*files)]).entries] == expected


def test_folders_whose_names_read_alike_together_are_kept_apart(tree):
    folder = tree("a__b/c.svs", "a/b__c.svs", "d/c.svs", "d/b__c.svs")
    assert len({entry.name for entry in list_slides([folder]).entries}) == 4


def test_a_slide_and_its_copy_that_once_had_one_name_get_two(tree):
    folder = tree("a/s.svs", "b/s.svs")
    paths = [folder / "a/s.svs", folder / "b/s.svs"]
    given = dict.fromkeys(paths, "s")
    assert choose_names(paths, ["a__s", "b__s"], given) == ["s", "b__s"]
    assert choose_names(paths[1:], ["s"], given) == ["s"]


def test_a_slide_given_twice_is_refused(tree):
    folder = tree("1.svs")
    with pytest.raises(UsageError, match=r"1\.svs given twice"):
        list_slides([folder, folder / "1.svs"])


# --- tables -----------------------------------------------------------------------------------


def table(folder, text):
    path = folder / "cohort.csv"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_a_table_gives_slides_resolution_patient_and_tissue(tree):
    folder = tree("slides/1.svs", "2.svs", "roi/1.geojson")
    path = table(folder, "slide, mpp, case_id, roi\nslides/1.svs, 0.25, P1, roi/1.geojson\n2.svs,,,\n")
    assert list_slides([path]).entries == (
        SlideEntry(folder / "slides/1.svs", "1", 0.25, "P1", folder / "roi/1.geojson"),
        SlideEntry(folder / "2.svs", "2"),
    )


@pytest.mark.parametrize("process", [(0, 0), (1, 0)])
def test_clams_process_list_is_read_as_its_extraction_does(tree, process):
    """Its patching sets ``process`` to 0 where it is done; its extraction takes all slides."""
    folder = tree("slides/a.svs", "slides/b.svs")
    text = "slide_id,process,status,seg_level\na.svs,{},processed,-1\nb.svs,{},processed,-1\n"
    slides = list_slides([table(folder, text.format(*process))], slide_folder=folder / "slides")
    assert [entry.path for entry in slides.entries] == [folder / "slides/a.svs", folder / "slides/b.svs"]
    assert slides.ignored == ()


def test_a_slide_that_a_table_names_and_nobody_has_stays_in_the_list(tree):
    path = table(tree("here.svs"), "slide\nhere.svs\ngone.svs\n")
    assert [entry.path.name for entry in list_slides([path]).entries] == ["here.svs", "gone.svs"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,mpp\na.svs,0.5\n", "has the columns name, mpp; it needs one of slide, slide_id, wsi"),
        ("", "has the columns of nothing"),
        (
            "slide;mpp\na.svs;0,25\n",
            "separated by ';'; save it with commas, and numbers with a decimal point",
        ),
        ("slide\tmpp\na.svs\t0.25\n", "separated by tabs; save it with commas"),
        ("slide\n", "names no slide"),
        ("slide,mpp, mpp\na.svs,0.25,0.5\n", "has 2 columns mpp; leave one of them"),
        ("slide,mpp\na.svs,fine\n", r"line 2: mpp is 'fine'; give µm/px"),
        ("slide,mpp\n,0.5\n", "line 2: no slide; fill it in"),
        ("slide\na.svs\na.svs\n", r"a\.svs given twice"),
    ],
)
def test_tables_that_cannot_be_meant_are_one_line(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as caught:
        list_slides([table(tmp_path, text)])
    assert "\n" not in str(caught.value)


CELLS = st.sampled_from(["a.svs", "b.svs", "", "0.5", "nan", "1e999", "\0", "x" * 300, "https://h/a.svs"])
CELLS |= st.sampled_from(['"', "x" * 140_000, "/" + "y/" * 3000, "://", "s3://[", "\r"]) | st.text(max_size=4)


@given(
    rows=st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=4),
    tail=st.binary(max_size=3),
    head=st.sampled_from(["slide,mpp,case_id,roi", "wsi,roi", "slide,slide"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_table_holds_is_a_list_or_refused_in_one_line(tmp_path, rows, tail, head):
    text = "\n".join([head, *map(",".join, rows)])
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8", "surrogatepass") + tail)
    try:
        names = [entry.name for entry in list_slides([tmp_path / "t.csv"]).entries]
    except UsageError as exc:
        assert len(str(exc).splitlines()) == 1
    else:
        assert 0 < len(set(names)) == len(names)


def test_sources_without_slides_and_tables_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00slide")
    told = {"empty": "holds no slide", "*.svs": "holds no slide", "x.csv": "no CSV in UTF-8"}
    for name, words in {**told, "y.csv": "cannot read"}.items():
        with pytest.raises(UsageError, match=words):
            list_slides([tmp_path / name])


# --- shards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_shards_are_disjoint_and_whole(count):
    slides = list_slides([Path(f"{i}.svs") for i in range(13)])
    shards = [slides.shard(i, count) for i in range(1, count + 1)]
    together = [entry.name for shard in shards for entry in shard.entries]
    assert sorted(together) == sorted(entry.name for entry in slides.entries)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("index", "count"), [(0, 3), (4, 3), (-1, 3)])
def test_a_shard_that_there_is_not_is_refused(index, count):
    with pytest.raises(UsageError, match="allowed: 1/3 to 3/3"):
        list_slides([Path("a.svs")]).shard(index, count)

"""Slides at URLs: listed, copied before they are read, known again without a copy, told apart from files."""

import re
import threading
import zipfile
from pathlib import Path

import pytest
from cohort_fixtures import contents, link_cohort, run, run_here

from seal_extract import ExtractOptions, extract, open_slide
from seal_extract.cli import main
from seal_extract.errors import SlideOpenError, UsageError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.job import SlideJob
from seal_extract.run.staging import Stage
from seal_extract.run.status_table import read_status
from seal_extract.slides.listing import list_slides
from seal_extract.slides.remote import address, public


def staged(tmp_path, **more):
    return ExtractOptions(stage_dir=tmp_path / "fast", stage_gb=0.01, **more)


def nothing_left(tmp_path):
    return not list((tmp_path / "fast").iterdir())


# --- which slides -----------------------------------------------------------------------------


def test_folders_and_patterns_of_urls_are_listed(memory):
    for name in ("a/1.svs", "b/deep/2.tiff", "b/notes.txt", "b/3.mrxs"):
        memory.pipe(f"/site/{name}", b"x")
    slides = list_slides(["memory://site"])
    assert [entry.source for entry in slides.entries] == [
        "memory://site/a/1.svs",
        "memory://site/b/deep/2.tiff",
    ]
    assert slides.ignored == (
        ("memory://site/b/3.mrxs", "slides of several files are not read from URLs"),
        ("memory://site/b/notes.txt", ".txt is no slide"),
    )
    assert [e.source for e in list_slides(["memory://site/*/*.svs"]).entries] == ["memory://site/a/1.svs"]


def test_urls_and_files_of_one_stem_are_kept_apart(tmp_path):
    slides = list_slides([tmp_path / "x" / "s.svs", "memory://bucket/x/s.svs", "memory://bucket/y/s.svs"])
    assert [entry.name for entry in slides.entries] == [f"{tmp_path.name}__x__s", "bucket__x__s", "y__s"]


def test_a_table_may_name_urls(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("slide,mpp,case_id\nmemory://bucket/a.svs,0.25,P1\nb.svs,,\n")
    first, second = list_slides([table]).entries
    assert (first.source, first.name, first.mpp, first.case_id) == ("memory://bucket/a.svs", "a", 0.25, "P1")
    assert second.source == str(tmp_path / "b.svs")
    _, second = list_slides([table], slide_folder="memory://other/slides/").entries
    assert second.source == "memory://other/slides/b.svs"


def test_file_urls_are_files(tmp_path):
    path = tmp_path / "a b.svs"
    assert address(path.as_uri()) == path
    assert list_slides([path.as_uri()]).entries == list_slides([path]).entries


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:secret@host/a.svs?X-Amz-Signature=secret#secret", "https://host/a.svs"),
        ("https://secret@host/a.svs", "https://host/a.svs"),
        ("https://me:sec@ret@host:80/a.svs", "https://host:80/a.svs"),
        ("https://me:sec/ret@host/a.svs", "https://host/a.svs"),
        ("https://host/a.svs;sig=secret", "https://host/a.svs"),
        ("https://host/a;1.svs", "https://host/a;1.svs"),
        ("https://host/a.svs?sig=" + "secret%2b" * 50, "https://host/a.svs"),
        ("http://[::1]:80/a.svs?sig=secret", "http://[::1]:80/a.svs"),
        ("zip://in/a.svs::https://me:secret@host/z.zip?sig=secret", "zip://in/a.svs::https://host/z.zip"),
        ("s3://key:secret@bucket/a.svs?versionId=1", "s3://bucket/a.svs"),
        ("az://container/a.svs?sv=1&sig=secret", "az://container/a.svs"),
        ("sftp://me:secret@host/a.svs", "sftp://host/a.svs"),
        ("abfs://container@account.net/a.svs", "abfs://container@account.net/a.svs"),
        ("s3://bucket/what?.svs", "s3://bucket/what?.svs"),
    ],
)
def test_of_a_url_scheme_host_and_path_are_public(url, words):
    assert public(url) == words
    assert public(words) == words


def test_a_secret_with_the_mark_of_a_pattern_is_no_pattern():
    (entry,) = list_slides(["https://host/a.svs?sig=a*b[c"]).entries
    assert (entry.name, entry.source) == ("a", "https://host/a.svs")
    assert "sig" not in repr(entry)


def test_open_slide_does_not_tell_the_secrets_of_a_url():
    with pytest.raises(SlideOpenError, match=r"^https://host/a\.svs is a URL") as caught:
        open_slide("https://me:secret@host/a.svs?sig=secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["s3://bucket/a.mrxs"], "slides of several files are not read from URLs; copy it"),
        (["https://host/a.dcm"], "slides of several files are not read from URLs; copy it"),
        (["s3://bucket/list.csv"], "tables are read from files; download it"),
        (["nowhere://bucket/a.svs"], "nowhere:// is unknown to fsspec; allowed: https://"),
        (["memory://empty-*/"], "holds no slide that can be read from there"),
        (["memory://b/a.svs", "memory://b/a.svs"], r"memory://b/a\.svs given twice"),
    ],
)
def test_urls_that_cannot_be_meant_are_one_line(memory, sources, words):
    with pytest.raises(UsageError, match=words) as caught:
        list_slides(sources)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UsageError, match=r"s3:// needs a package that is missing; type: pip install s3fs"):
        list_slides(["s3://bucket/a.svs"])


def test_a_site_that_cannot_be_reached_is_one_line(web):
    web.shutdown()
    web.server_close()
    for url in ("/slides/", "/slides/*.svs"):
        with pytest.raises(SlideOpenError, match=r"cannot be listed: .*check the URL and the network"):
            list_slides([web.url + url])


# --- runs -------------------------------------------------------------------------------------


def test_slides_at_urls_give_what_their_files_give(memory, drawn_slides, encoder, tmp_path):
    slides = link_cohort(tmp_path / "slides", drawn_slides, 4)
    for path in slides.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    results = []
    report = extract_cohort(
        "memory://bucket", encoder, tmp_path / "urls", options=staged(tmp_path), on_result=results.append
    )
    assert len(report.done) == 4
    extract_cohort(slides, encoder, tmp_path / "files")
    assert contents(tmp_path / "urls") == contents(tmp_path / "files")
    assert nothing_left(tmp_path)
    assert read_status(report.status)["slide_0002"].slide == "memory://bucket/slide_0002.svs"
    slide = next(r for r in results if r.name == "slide_0002").features[0].provenance["slide"]
    assert slide["path"] == "memory://bucket/slide_0002.svs"
    assert slide["version"].startswith("created ")
    alone = extract("memory://bucket/slide_0002.svs", encoder, tmp_path / "alone", options=staged(tmp_path))
    assert len(alone.grid) > 1


def test_a_finished_slide_is_not_fetched_again_until_it_changes(web, drawn_slides, encoder, tmp_path):
    slides = link_cohort(tmp_path / "www" / "slides", drawn_slides, 3)
    url = f"{web.url}/slides/"
    assert len(extract_cohort(url, encoder, tmp_path / "out", options=staged(tmp_path)).done) == 3
    fetched = [f"/slides/slide_000{i}.svs" for i in range(3)]
    assert sorted(path for path in web.fetched if path.endswith(".svs")) == fetched
    web.fetched.clear()
    again = extract_cohort(url, encoder, tmp_path / "out")  # needs no folder for copies either
    assert [row.seconds for row in again.done] == [None] * 3
    assert not [path for path in web.fetched if path.endswith(".svs")]
    (slides / "slide_0001.svs").unlink()
    (slides / "slide_0001.svs").write_bytes(drawn_slides[2].read_bytes())
    changed = extract_cohort(url, encoder, tmp_path / "out", options=staged(tmp_path))
    assert [row.name for row in changed.failed] == ["slide_0001"]
    assert "(a slide with other content)" in changed.failed[0].reason
    assert [path for path in web.fetched if path.endswith(".svs")] == ["/slides/slide_0001.svs"]


def test_a_url_without_a_folder_for_copies_is_refused(memory, drawn_slides, encoder, tmp_path):
    memory.pipe("/bucket/a.svs", drawn_slides[0].read_bytes())
    for call in (extract_cohort, extract):
        with pytest.raises(UsageError, match=r"a\.svs is a URL, which is copied before it is read; type"):
            call("memory://bucket/a.svs", encoder, tmp_path / "out")


def test_a_slide_that_breaks_off_fails_and_is_tried_again(web, drawn_slides, encoder, tmp_path):
    link_cohort(tmp_path / "www", drawn_slides, 1)
    url = f"{web.url}/slide_0000.svs?signature=secret"
    web.cut_after = 20_000
    first = extract_cohort(url, encoder, tmp_path / "out", options=staged(tmp_path))
    (row,) = first.failed
    assert row.reason.startswith(f"{web.url}/slide_0000.svs cannot be fetched: ")
    assert row.reason.endswith("check the URL and the network, then run again")
    assert "secret" not in first.status.read_text()
    assert nothing_left(tmp_path)
    web.cut_after = None
    assert len(extract_cohort(url, encoder, tmp_path / "out", options=staged(tmp_path)).done) == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("gone", "404"),
        ("size unknown", "its server does not say how large it is; download it"),
        ("too large", "more than --stage-gb 1e-06; type --stage-gb 0.01 or more"),
        ("damaged", r"slide_0000\.svs is truncated"),
    ],
)
def test_what_stops_one_url_stops_no_other(web, drawn_slides, encoder, tmp_path, memory, what, words):
    folder = link_cohort(tmp_path / "www", drawn_slides, 1)
    path = folder / "slide_0000.svs"
    options = staged(tmp_path)
    memory.pipe("/bucket/good.svs", drawn_slides[0].read_bytes())
    if what == "gone":
        path.unlink()
    elif what == "size unknown":
        web.without = ("Content-Length",)
    elif what == "too large":
        options = ExtractOptions(stage_dir=tmp_path / "fast", stage_gb=1e-6)
        memory.pipe("/bucket/good.svs", b"small")
    else:
        path.unlink()
        path.write_bytes(drawn_slides[0].read_bytes()[:50_000])
    sources = [f"{web.url}/slide_0000.svs", "memory://bucket/good.svs"]
    report = extract_cohort(sources, encoder, tmp_path / "out", options=options)
    row = next(row for row in report.failed if row.name == "slide_0000")
    assert row.reason.startswith(f"{web.url}/slide_0000.svs")
    assert re.search(words, row.reason), row.reason
    assert "fast" not in row.reason  # the copy is nobody's business
    assert len(report.done) == (what != "too large")
    assert nothing_left(tmp_path)


SECRETS = ["?sig=hushhush", "?sig=hush%2Bhush", ";sig=hushhush", "?sig=" + "hush" * 99]


@pytest.mark.parametrize("path", ["there.svs", "gone.svs", "led%20away.svs", "led%2baway.svs"])
@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_of_urls_are_written_nowhere(web, drawn_slides, tmp_path, path, secret):
    """Neither those of a slide that is done, nor of one that is not there, nor where a redirect leads."""
    link_cohort(tmp_path / "www", drawn_slides, 1)
    (tmp_path / "www/slide_0000.svs").rename(tmp_path / "www/there.svs")
    web.leads_to = {"/led": f"{web.url}/nowhere/gone.svs?sig=hushagain"}
    url = f"{web.url}/{path}{secret}".replace("://", "://hush:hu@sh@")
    log = tmp_path / "log"
    words = ("-o", tmp_path / "out", "--encoder", "seal-tiny", "--stage-dir", tmp_path / "fast")
    done = run_here(url, *words, "--log-json", log)
    assert done.returncode == (path != "there.svs"), done.stderr
    assert re.search(r"there\.svs: \d+ patches|cannot be fetched: HTTP 404", done.stdout + done.stderr)
    said = (done.stdout + done.stderr).encode() + log.read_bytes()
    for file in (tmp_path / "out").rglob("*.*"):
        said += str(file).encode() + file.read_bytes()
    assert b"there.svs" in said or b"away.svs" in said or b"gone.svs" in said
    assert b"hush" not in said
    assert b"hu@sh" not in said


def test_a_slide_in_an_archive_at_a_url_is_read(memory, drawn_slides, encoder, tmp_path):
    with memory.open("/z.zip", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.write(drawn_slides[0], "in/a.svs")
    url = "zip://in/a.svs::memory://z.zip"
    report = extract_cohort(url, encoder, tmp_path / "out", options=staged(tmp_path))
    assert [(row.name, row.slide) for row in report.done] == [("a", url)]


def test_copies_of_urls_stay_within_the_bound(memory, drawn_slides, tmp_path):
    for i, path in enumerate(drawn_slides * 3):
        memory.pipe(f"/bucket/{i}.svs", path.read_bytes())
    limit = 2 * max(path.stat().st_size for path in drawn_slides)
    stage = Stage(tmp_path / "fast", limit)
    most = done = 0
    for job in stage.copied(jobs(["memory://bucket"])):
        most = max(most, sum(p.stat().st_size for p in (tmp_path / "fast").rglob("*.svs")))
        assert job.entry.file.read_bytes() == memory.cat(job.entry.url)
        stage.release(job.entry)
        done += 1
    stage.close()
    assert done == 9
    assert 0 < most <= limit


def jobs(sources):
    return [SlideJob.of(entry, Path(), ExtractOptions()) for entry in list_slides(sources).entries]


def test_closing_stops_a_copy_under_way(web, drawn_slides, tmp_path):
    link_cohort(tmp_path / "www", drawn_slides, 1)
    web.go_on.clear()
    stage = Stage(tmp_path / "fast", 10**8)
    stage.copied(jobs([f"{web.url}/slide_0000.svs"]))
    assert web.held.wait(10)
    threading.Timer(0.2, web.go_on.set).start()
    stage.close()
    assert nothing_left(tmp_path)
    assert not any(thread.name == "stage" for thread in threading.enumerate())


# --- the command line -------------------------------------------------------------------------


def test_the_command_reads_a_slide_from_the_web(web, drawn_slides, encoder_folder, tmp_path, capsys):
    link_cohort(tmp_path / "www", drawn_slides, 1)
    url = f"{web.url}/slide_0000.svs"
    words = (url, "-o", str(tmp_path / "out"), "--encoder", str(encoder_folder))
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"seal-extract: {url} is a URL, which is copied before it is read; type --stage-dir FOLDER, "
        "and --stage-gb GB for what copies may fill"
    ]
    assert main([url, "--dry-run", "--stage-dir", str(tmp_path / "fast")]) == 0
    assert "slide_0000.svs" in capsys.readouterr().out
    assert nothing_left(tmp_path)
    done = run(*words, "--stage-dir", tmp_path / "fast")
    assert (done.returncode, done.stderr) == (0, "")
    assert "patches by untrained-demo" in done.stdout
    web.fetched.clear()
    assert main(words) == 0
    assert "finished before" in capsys.readouterr().out
    assert not web.fetched
    assert nothing_left(tmp_path)

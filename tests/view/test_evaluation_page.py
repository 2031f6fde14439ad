"""The page of evaluations: its numbers are those of the JSON, its dots lie where they belong."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
from conftest import one_line
from viewer_fixtures import Page, Tags

from seal_extract.errors import OutputError
from seal_extract.evaluate.table import Report, Row, Table, number
from seal_extract.view.evaluation_page import Axis, Part, genes, write_evaluation_page

HOSTILE = "<b>ours</b> & 'theirs'"
SECTIONS = ("C2", "C3", "C4", "C5")
TITLE = "Pearson r of predicted expression, ridge"


def expression(ours="ours"):
    """A report of three contenders over four sections, with r of twelve genes."""
    rng = np.random.default_rng(0)
    names = (ours, f"{ours}, rows permuted", "base, before alignment")
    rows = tuple(Row(name, tuple(rng.normal(0.3, 0.1, 4).tolist())) for name in names)
    recall = Table("Recall at 1", SECTIONS, tuple(Row(name, (0.1, 0.2, 0.3, 0.4)) for name in names))
    undefined = Table("AUC", ("fold_0", "fold_1"), tuple(Row(name, (0.5, float("nan"))) for name in names))
    per_gene = {
        f"{name}, ridge": {s: {f"g{i}": i / 20 + j / 100 if i else None for i in range(12)} for s in SECTIONS}
        for j, name in enumerate(names[::2])
    }
    tables = [Table(TITLE, SECTIONS, rows, unit="section"), recall, undefined]
    about = {
        "encoder": "/home/me/ours",
        "by": ["a", "b"],
        "base": None,
        "command": "seal-extract evaluate --encoder /home/me/ours",
    }
    return Report("evaluation", tables, about, [f"{ours} saw C2"], {"pearson_r_per_gene": per_gene})


def robustness():
    """Different figures of two encoders, and a picture."""
    from matplotlib.figure import Figure

    rows = (Row("ours", (0.9, float("nan"), 0.2), (0.1, 0.1, 0.1)), Row("base", (0.5, 12.3, -0.4)))
    table = Table("Clusters", ("cosine", "MI", "ARI"), rows, "A note.", summary="")
    return Report("robustness", [table], {"patches": 2000}, figure=Figure(figsize=(2, 1)))


@pytest.fixture
def folder(tmp_path):
    for report in (robustness(), expression()):
        report.write(tmp_path)
    (tmp_path / "settings.json").write_text('{"tables": 3}')
    (tmp_path / "broken.json").write_text('{"tables": [')
    write_evaluation_page(tmp_path)
    return tmp_path


def rows_of(html):
    """The text of all cells of every row; that of a plot is what its dots say."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [[Tags(cell).text for cell in re.split(r"</t[hd]>", row)[:-1]] for row in rows]


def test_the_numbers_are_those_of_the_json(folder):
    html = (folder / "evaluation.html").read_text(encoding="utf-8")
    rows = rows_of(html)
    (drawn, *_), (clusters,) = (
        json.loads((folder / f"{name}.json").read_text())["tables"] for name in ("evaluation", "robustness")
    )
    assert len(drawn["differences"]) == 2
    for row in (*drawn["rows"], *drawn["differences"]):
        dots = [f"{fold}: {number(value)}" for fold, value in row["folds"].items()]
        numbers, sign = [row["mean"], *row["interval"]], row in drawn["differences"]
        mean, low, high = ("+" * (sign and v > 0) + number(v) for v in numbers)
        name = f"{TITLE} 4 × section" if sign else row["line"]
        assert [name, " ".join([*dots, f"mean {number(row['mean'])}"]), mean, f"{low} to {high}"] in rows
        assert sign == (f"<h3>{row['line']}</h3>" in html)
        assert (
            sign or [row["line"], *map(number, row["folds"].values()), number(row["mean"], row["sd"])] in rows
        )
    for figure in ("cosine", "MI", "ARI"):
        ours, base = (row["folds"][figure] for row in clusters["rows"])
        dots = [f"{name}: {number(v)}" for name, v in (("ours", ours), ("base", base)) if v is not None]
        cells = ["–" if ours is None else number(ours, 0.1), number(base)]
        assert [figure, " ".join(dots), *cells] in rows
    assert ["ours", "0.100", "0.200", "0.300", "0.400", "0.250 ± 0.129"] in rows  # Recall at 1
    assert ["ours", "0.500", "–", "–"] in rows  # AUC, without one in a fold


def test_warnings_come_first_and_what_was_run_is_named_without_folders(folder):
    text = Tags((folder / "evaluation.html").read_text(encoding="utf-8")).text
    order = (
        "ours saw C2",
        "ours minus base",
        TITLE,
        "g11",
        "evaluate --encoder ours",
        "Clusters",
        "patches 2000",
    )
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert f"versions seal-extract {version('seal-extract')}, torch 2." in text
    assert "by a, b" in text
    assert "/home" not in text
    assert "Of 1 differences" in text


def test_nothing_is_loaded_and_names_are_text(tmp_path):
    expression(HOSTILE).write(tmp_path)
    robustness().write(tmp_path)
    html = write_evaluation_page(tmp_path).read_text(encoding="utf-8")
    parsed = Tags(html)
    assert not parsed.all("script")
    assert not re.search(r"@import|url\(|\shref=\"(?!#|data:,)", html)
    assert [image["src"][:22] for image in parsed.all("img")] == ["data:image/png;base64,"]
    assert parsed.text.count(HOSTILE) > 5
    policy = next(a["content"] for a in parsed.all("meta") if "content-security-policy" in str(a).lower())
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_page_is_made_again_and_what_is_none_is_left(folder, run):
    before = (folder / "evaluation.html").read_bytes()
    assert write_evaluation_page(folder).read_bytes() == before
    (folder / "evaluation.html").write_text("<title>my notes</title>")
    with pytest.raises(OutputError, match="is no page of seal-extract evaluate; move it, or type another -o"):
        write_evaluation_page(folder)
    usual = ("evaluate", "robustness", folder, "--slides", "scans.csv", "-o", folder, "--overwrite")
    one_line(run(*usual), 1, "is no page of seal-extract evaluate")
    assert (folder / "evaluation.html").read_text() == "<title>my notes</title>"


def test_a_file_of_before_has_plain_tables(folder):
    file = folder / "evaluation.json"
    data = json.loads(file.read_text())
    for table in data["tables"]:
        del table["unit"], table["differences"]
        for row in table["rows"]:
            del row["interval"]
    file.write_text(json.dumps(data))
    html = write_evaluation_page(folder).read_text()
    assert "<details open><summary>3 more tables" in html
    assert "<h2>Differences" not in html


def test_genes_are_sorted_by_their_mean_over_the_folds(folder):
    (plot,) = genes(Part.read(folder / "evaluation.json"))
    assert plot.title == "ridge"
    assert plot.names == tuple(f"g{i}" for i in range(11, 0, -1))  # g0 has no r
    assert plot.r["ours"] == pytest.approx([i / 20 for i in range(11, 0, -1)])
    assert plot.describe(0) == "g11; ours: 0.550; base, before alignment: 0.560"
    assert [words for words, _ in plot.ends()] == [
        "Highest",
        "Lowest",
        "Highest above base, before alignment",
    ]
    assert plot.ends()[1][1][0] == ("g1", pytest.approx(0.05))
    assert "<title>g11; ours: 0.550; base" in (folder / "evaluation.html").read_text()


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.26, 0.33], [0.26, 0.27, 0.28, 0.29, 0.3, 0.31, 0.32, 0.33]),
        ([-0.15, 0.26, 0], [-0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        ([0, 12.3], [0, 2, 4, 6, 8, 10, 12, 14]),
        ([0.5], [0.5, 0.5002]),
        ([None], [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_an_axis_has_round_ticks_around_all_values(values, ticks):
    axis = Axis.over(values)
    assert axis.ticks == pytest.approx(ticks)
    assert [axis.at(ticks[0]), axis.at(ticks[-1])] == pytest.approx([3, 97])
    assert len({axis.text(tick) for tick in axis.ticks}) == len(ticks)


@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_draws_it_and_does_not_complain(chromium, folder, width):
    page = Page(chromium)
    chromium.get("about:blank")
    page.console()
    chromium.set_window_size(width, 900)
    chromium.get((folder / "evaluation.html").as_uri())
    page.until("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.look("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.console() == []
    row = json.loads((folder / "evaluation.json").read_text())["tables"][0]["rows"][0]
    places = (
        "[...document.querySelectorAll('#evaluation .plot tbody tr:first-child {}')].map(e => {{"
        "const b = e.getBoundingClientRect(); return b.left + b.width / 2 }})"
    )
    dots, (mean,), (line,) = (page.look(places.format(kind)) for kind in (".fold", ".mean", ".interval"))
    values = list(row["folds"].values())
    slope, start = np.polyfit(values, dots, 1)
    assert slope > 0
    assert dots == pytest.approx([start + slope * v for v in values], abs=0.5)
    assert mean == pytest.approx(start + slope * row["mean"], abs=0.5)
    assert line == pytest.approx(start + slope * np.mean(row["interval"]), abs=0.5)
    assert len(page.look("[...document.querySelectorAll('.gene')]")) == 11
    chromium.set_window_size(1300, 900)

"""The index held to brute force: ties, empty slides, memory; and its folder on the disk."""

import json
import subprocess
import sys
from functools import reduce
from operator import getitem

import h5py
import numpy as np
import pytest
from gene_fixtures import features_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seal_extract.errors import OutputError, UsageError
from seal_extract.genes import faiss_index as faiss_module
from seal_extract.genes.faiss_folder import MANIFEST
from seal_extract.genes.feature_rows import RowPlaces
from seal_extract.genes.index import ExactIndex, Found, unit_pieces

DIM = 8


def brute_force(tables, queries, k, hidden=()):
    """(score, slide, row) of the best, by float64 sums of every pair."""
    answer = []
    for query in queries.astype(np.float64):
        every = []
        for i, table in enumerate(tables):
            for j, values in enumerate(table.astype(np.float64)):
                score = (values * query).sum()
                score /= np.sqrt((values**2).sum()) * np.sqrt((query**2).sum()) or 1
                if (i, j) not in hidden:
                    every.append((-np.float32(score), i, j))
        answer.append([(-score, i, j) for score, i, j in sorted(every)[:k]])
    return answer


def answer_of(hits):
    return [
        [(s, i, j) for s, i, j in zip(*rows, strict=True) if i >= 0]
        for rows in zip(hits.scores.tolist(), hits.slide.tolist(), hits.row.tolist(), strict=True)
    ]


# --- exact --------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 90),
    levels=st.sampled_from([2, 3, 1000]),
    piece=st.sampled_from([1, 3, 10**6]),
)
def test_exact_is_brute_force(tmp_path_factory, monkeypatch, counts, seed, k, levels, piece):
    # few levels give many equal rows; pieces of one and three rows put them in other products of matrices
    monkeypatch.setattr("seal_extract.features.store.PIECE_BYTES", piece * DIM * 4)
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("exact")
    tables = [rng.integers(-levels, levels + 1, (n, DIM)).astype(np.float32) / 7 for n in counts]
    queries = rng.normal(size=(3, DIM)).astype(np.float32)
    index = ExactIndex([features_file(folder / f"s{i}.h5", t) for i, t in enumerate(tables)])
    assert answer_of(index.search_many(queries, k)) == brute_force(tables, queries, k)


@pytest.mark.parametrize("dim", [13, 512])
def test_equal_rows_score_equally_wherever_they_lie(tmp_path, monkeypatch, dim):
    monkeypatch.setattr("seal_extract.features.store.PIECE_BYTES", 7 * dim * 4)
    rng = np.random.default_rng(0)
    one, query = rng.normal(size=dim), rng.normal(size=dim)
    some = [features_file(tmp_path / f"s{i}.h5", np.tile(one, (n, 1))) for i, n in enumerate([10, 1, 23])]
    found = ExactIndex(some).search(query, 20)
    in_order = [(slide.path.stem, row) for slide in some for row in range(len(slide.grid))]
    assert [(f.slide.path.stem, f.row) for f in found] == in_order[:20]
    assert len({f.score for f in found}) == 1


def test_float16_files_are_scored_as_they_are(tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, DIM)).astype(np.float16)
    index = ExactIndex([features_file(tmp_path / "a.h5", rows, dtype=np.float16)])
    queries = np.eye(DIM, dtype=np.float32)[:3]
    assert answer_of(index.search_many(queries, 5)) == brute_force([rows], queries, 5)


def test_named_slides_only_and_rows_left_out(tmp_path):
    rng = np.random.default_rng(0)
    tables = [rng.normal(size=(n, DIM)).astype(np.float32) for n in (20, 30, 10)]
    slides = [features_file(tmp_path / f"s{i}.h5", t) for i, t in enumerate(tables)]
    queries, index = tables[1][:2], ExactIndex(slides)
    others = {(0, row) for row in range(20)}
    hits = index.search_many(queries, 15, among=["s2", "s1"], skip=[Found(slides[1], 0, 1.0)])
    assert answer_of(hits) == brute_force(tables, queries, 15, hidden=others | {(1, 0)})
    assert next((f.slide.path.stem, f.row) for f in hits.of(1)) == ("s1", 1)
    with pytest.raises(UsageError, match="there is no slide s9 here; the nearest are s"):
        index.search_many(queries, 1, among=["s9"])


def test_queries_with_fewer_hits_are_filled_up(tmp_path):
    rows = np.ones((3, DIM))
    rows[1] = np.nan
    rows[2, 0] = np.inf
    hits = ExactIndex([features_file(tmp_path / "a.h5", rows)]).search_many(np.ones((2, DIM)), 9)
    assert answer_of(hits) == [[(1.0, 0, 0)]] * 2
    empty = ExactIndex([features_file(tmp_path / "b.h5", np.empty((0, DIM)))])
    assert empty.search_many(np.ones((2, DIM)), 9).scores.shape == (2, 0)


def test_what_cannot_be_meant_is_refused(tmp_path):
    slides = [features_file(tmp_path / "a.h5", np.ones((3, DIM)))]
    queries = np.ones((3, DIM))
    queries[1, 2] = np.nan
    with pytest.raises(UsageError, match="query 1 is 0 or not finite"):
        ExactIndex(slides).search_many(queries, 1)
    for query, k, answer in (
        (np.ones(DIM - 1), 1, r"the query is \[7\]; these features have 8 numbers a patch"),
        (np.full(DIM, np.nan), 1, "the query is 0 or not finite"),
        (np.zeros(DIM), 1, "the query is 0 or not finite"),
        (np.ones(DIM), 0, "0 patches were asked for; allowed: 1 or more"),
    ):
        with pytest.raises(UsageError, match=answer):
            ExactIndex(slides).search(query, k)
    others = ("y", r"was made by x and .* by y; give"), ("x of others", "by other weights of x")
    for encoder, answer in others:
        with pytest.raises(UsageError, match=answer):
            ExactIndex([*slides, features_file(tmp_path / "b.h5", np.ones((3, DIM)), encoder)])
    with pytest.raises(UsageError, match="there are no slides"):
        ExactIndex([])


def test_the_exact_search_holds_a_piece_in_memory_and_not_the_cohort(tmp_path):
    """200 MB of rows are searched, and grow the process by less than half of that."""
    for i in range(4):
        features_file(tmp_path / f"s{i}.h5", np.random.default_rng(i).normal(size=(25_000, 512)))
    code = """if True:
        import resource, sys, numpy as np
        from pathlib import Path
        from seal_extract.genes.index import ExactIndex
        from seal_extract.features.store import list_features
        index, rng = ExactIndex(list_features(Path(sys.argv[1]))[0]), np.random.default_rng(0)
        np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        index.search_many(rng.normal(size=(50, 512)), 10)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100 * 1024  # kB


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_single_rows_are_those_of_the_file(tmp_path, monkeypatch, dtype, compression):
    monkeypatch.setattr("seal_extract.features.feature_file.CHUNK_BYTES", 200)
    rows = np.random.default_rng(0).normal(size=(100, DIM)).astype(dtype)
    slide = features_file(tmp_path / "a.h5", rows, dtype=dtype)
    if compression:  # as another tool may have packed it again
        with h5py.File(slide.path, "r+") as file:
            name = "features" if dtype == np.float32 else "feats"
            del file[name]
            file.create_dataset(name, data=rows, chunks=(10, DIM), compression=compression)
    stat, places = slide.path.stat(), RowPlaces.of(slide.path)
    assert bool(places.chunks) == (compression is None)
    some, state = np.array([99, 0, 41]), (stat.st_size, stat.st_mtime_ns)
    np.testing.assert_array_equal(places.read(slide, some, state), rows[some].astype(np.float32))
    assert places.read(slide, some[:0], state).shape == (0, DIM)
    with pytest.raises(OutputError, match="has changed since the index was opened; type --index build"):
        places.read(slide, some, (1, 2))


# --- FAISS --------------------------------------------------------------------------------------


@pytest.fixture
def faiss_index(monkeypatch):
    """The module, looking into some cells only however small the index is."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(faiss_module, "WHOLE_ROWS", 0)
    return faiss_module


@pytest.fixture
def small_shards(monkeypatch):
    """Two slides of 700 patches lie in a shard."""
    monkeypatch.setattr("seal_extract.genes.faiss_folder.SHARD_BYTES", 1500 * (32 + 8))


@pytest.fixture
def tissue(tmp_path):
    """Slides whose patches lie in 60 groups, near 4 of 32 directions in each."""
    rng = np.random.default_rng(0)
    centres, around = rng.normal(size=(60, 32)), rng.normal(size=(60, 4, 32)) / 2

    def slide(i, n=700):
        rng = np.random.default_rng(i)
        group = rng.integers(60, size=n)
        near = np.einsum("nj,njd->nd", rng.normal(size=(n, 4)), around[group])
        rows = centres[group] + near + 0.1 * rng.normal(size=(n, 32))
        return features_file(tmp_path / "run" / f"s{i}.h5", rows)

    return slide


def recall(index, slides, queries, **how):
    """Share of the ten best that it finds; what both find has equal scores."""
    ours, right = (one.search_many(queries, 10, **how) for one in (index, ExactIndex(slides)))
    shares = []
    for q in range(len(queries)):
        mine, best = ({(f.slide.path, f.row): f.score for f in hits.of(q)} for hits in (ours, right))
        assert all(best[key] == mine[key] for key in mine.keys() & best.keys())
        shares.append(len(mine.keys() & best.keys()) / len(best))
    return np.mean(shares)


def test_faiss_finds_nearly_all_with_exact_scores(tissue, faiss_index, tmp_path):
    slides = [tissue(i) for i in range(8)]
    index = faiss_index.build(slides, tmp_path / "index")
    assert str(index.changes) == "8 slides added, 0 changed, 0 dropped, 0 kept"
    queries = tissue(99, 50).features
    assert recall(index, slides, queries) >= 0.95
    assert recall(index, slides, queries, among=["s3"]) >= 0.95
    assert recall(index, slides, queries[:1]) == 1  # in one thread
    asked = [Found(slides[2], row, 1.0) for row in range(20)]
    hits = index.search_many(slides[2].features[:20], 10, skip=asked)
    found = [(f.slide.path.stem, f.row) for q in range(20) for f in hits.of(q)]
    assert not [row for slide, row in found if slide == "s2" and row < 20]


def test_equal_rows_come_in_the_order_of_slides_and_rows(faiss_index, tmp_path):
    rows = np.tile(np.random.default_rng(0).normal(size=DIM), (6, 1))
    slides = [features_file(tmp_path / f"s{i}.h5", rows) for i in range(3)]
    found = faiss_index.build(slides, tmp_path / "index").search(rows[0], 18)
    assert [(f.slide.path.stem, f.row) for f in found] == [(f"s{i}", j) for i in range(3) for j in range(6)]


def test_updates_say_what_they_did_and_share_a_file(tissue, faiss_index, tmp_path):
    slides, folder = [tissue(i) for i in range(6)], tmp_path / "index"
    faiss_index.build(slides[:4], folder)
    changed = features_file(slides[1].path, tissue(50, 300).features)
    now = [slides[0], changed, *slides[3:]]
    index = faiss_index.build(now, folder)
    assert str(index.changes) == "2 slides added, 1 changed, 1 dropped, 2 kept"
    assert len(list(folder.glob("shard_*"))) == 1
    queries = tissue(99, 50).features
    assert recall(index, now, queries) >= 0.95
    assert "s2" not in {f.slide.path.stem for f in index.search(slides[2].features[0], 500)}
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert str(faiss_index.build(now, folder).changes) == "0 slides added, 0 changed, 0 dropped, 5 kept"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.usefixtures("small_shards")
def test_files_of_rows_are_bounded_and_go_when_mostly_dropped(tissue, faiss_index, tmp_path):
    slides, folder = [tissue(i) for i in range(6)], tmp_path / "index"
    faiss_index.build(slides, folder)
    assert [p.name for p in sorted(folder.glob("shard_*"))] == [f"shard_000{i}.faiss" for i in range(3)]
    index = faiss_index.build(slides[2:], folder)
    assert len(list(folder.glob("shard_*"))) == 2
    assert recall(index, slides[2:], tissue(99, 50).features) >= 0.95


def test_an_outgrown_index_is_made_anew(tissue, faiss_index, tmp_path):
    slides = [tissue(i) for i in range(8)]
    faiss_index.build(slides[:1], tmp_path / "index")
    index = faiss_index.build(slides, tmp_path / "index")
    assert str(index.changes) == "7 slides added, 0 changed, 0 dropped, 1 kept (1 put in again)"
    assert recall(index, slides, tissue(99, 50).features) >= 0.95


@pytest.mark.usefixtures("small_shards")
def test_a_build_that_was_stopped_goes_on(tissue, faiss_index, tmp_path, monkeypatch):
    slides, folder = [tissue(i) for i in range(6)], tmp_path / "index"
    read = []

    def fail(slide):
        read.append(slide.path)
        if read.count(slides[4].path) == 2:  # once to find the cells, once to add the rows
            raise KeyboardInterrupt
        return unit_pieces(slide)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("seal_extract.genes.faiss_folder.unit_pieces", fail)
        faiss_index.build(slides, folder)
    done = (folder / "shard_0000.faiss").stat().st_mtime_ns
    with pytest.raises(UsageError, match="2 slides have come or changed"):
        faiss_index.open_index(slides, folder)
    index = faiss_index.build(slides, folder)
    assert str(index.changes) == "2 slides added, 0 changed, 0 dropped, 4 kept"
    assert (folder / "shard_0000.faiss").stat().st_mtime_ns == done
    assert recall(index, slides, tissue(99, 50).features) >= 0.95


@pytest.mark.parametrize("damage", ["cut", "gone", "other bytes", "no cells"])
def test_what_is_damaged_is_told_and_made_again(tissue, faiss_index, tmp_path, damage):
    slides, folder = [tissue(i) for i in range(3)], tmp_path / "index"
    faiss_index.build(slides, folder)
    path = folder / ("trained_0000.faiss" if damage == "no cells" else "shard_0000.faiss")
    data = path.read_bytes()
    path.unlink()
    if damage in ("cut", "other bytes"):
        path.write_bytes(data[:1000] if damage == "cut" else b"\0" * len(data))
    if damage != "no cells":  # only adding needs it
        with pytest.raises(OutputError, match="is damaged or gone; type --index build to make it again"):
            faiss_index.open_index(slides, folder)
    index = faiss_index.build(slides, folder)
    assert str(index.changes) == "0 slides added, 0 changed, 0 dropped, 3 kept (3 put in again)"
    assert recall(faiss_index.open_index(slides, folder), slides, tissue(99, 20).features) >= 0.95


def test_folders_that_are_not_its_own_are_left_alone(tissue, faiss_index, tmp_path):
    slides, folder = [tissue(0)], tmp_path / "index"
    with pytest.raises(UsageError, match=r"there is no index in .* type --index build"):
        faiss_index.open_index(slides, folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no index of seal_extract, or a damaged one; remove it"):
        faiss_index.build(slides, folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    faiss_index.build(slides, tmp_path / "own")
    with pytest.raises(OutputError, match="is the index of another encoder"):
        faiss_index.build([features_file(tmp_path / "other.h5", np.ones((9, 16)), "y")], tmp_path / "own")
    manifest = tmp_path / "own" / MANIFEST
    for broken in ("{", "[]", "{}", json.dumps(json.loads(manifest.read_text()) | {"shards": {}})):
        manifest.write_text(broken)
        with pytest.raises(OutputError, match="holds no index of seal_extract, or a damaged one; remove it"):
            faiss_index.open_index(slides, tmp_path / "own")


JSON = st.sampled_from([None, True, -1, 0, 1, 1.5, 10**30, float("nan"), float("inf"), "", "x", "1", [], {}])
JSON |= st.sampled_from([[1], ["x"], [[1]], {"a": 1}, [10**30], [None], "<f8", "[" * 5000])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two slides, the folder of their index, and what its manifest says."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("built")
    rows = np.random.default_rng(0).normal(size=(2, 50, DIM))
    slides = [features_file(folder / f"s{i}.h5", rows[i]) for i in range(2)]
    faiss_module.build(slides, folder / "index")
    return slides, folder / "index", json.loads((folder / "index" / MANIFEST).read_text())


def places_in(value, at=()):
    """The keys that lead to each value of a JSON."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places_in(value[key], (*at, key))


@given(data=st.data(), other=JSON)
@settings(max_examples=200, deadline=None)
def test_whatever_a_manifest_says_is_searched_or_refused_in_one_line(built, data, other):
    slides, folder, listed = built
    *first, last = data.draw(st.sampled_from([at for at in places_in(listed) if at]))
    changed = json.loads(json.dumps(listed))
    reduce(getitem, first, changed)[last] = other
    (folder / MANIFEST).write_text(other if other == "[" * 5000 else json.dumps(changed))
    try:
        found = faiss_module.open_index(slides, folder).search(slides[1].features[0], 5)
    except (OutputError, UsageError) as exc:
        assert len(str(exc).splitlines()) == 1
    else:
        assert [(f.slide.path.stem, f.row) for f in found[:1]] == [("s1", 0)]


def test_a_features_file_that_goes_while_the_index_is_open_is_told(tissue, faiss_index, tmp_path):
    slides = [tissue(i) for i in range(2)]
    index = faiss_index.build(slides, tmp_path / "index")
    query = slides[1].features[0]
    slides[1].path.unlink()
    with pytest.raises(OutputError, match="has changed since the index was opened; type --index build"):
        index.search(query, 5)


def test_rows_that_say_nothing_do_no_harm(tissue, faiss_index, tmp_path):
    rows = tissue(0).features.copy()
    rows[::3], rows[1] = 0, np.nan
    slides = [features_file(tmp_path / "a.h5", rows), features_file(tmp_path / "b.h5", np.empty((0, 32)))]
    index = faiss_index.build(slides, tmp_path / "index")
    found = index.search(rows[2], 700)
    assert len(found) == len(ExactIndex(slides).search(rows[2], 700)) == 699
    nothing = [features_file(tmp_path / "c.h5", np.zeros((5, 32)))]
    with pytest.raises(OutputError, match="are 0 or not finite; encode these slides again"):
        faiss_index.build(nothing, tmp_path / "nothing")
    with pytest.raises(UsageError, match="these slides have no patches to search"):
        faiss_index.build(slides[1:], tmp_path / "none")


def test_a_damaged_features_file_is_named(tissue, faiss_index, tmp_path):
    slides = [tissue(i) for i in range(2)]
    slides[1].path.write_bytes(b"nothing")
    for ask in (ExactIndex, lambda slides: faiss_index.build(slides, tmp_path / "index")):
        with pytest.raises(OutputError, match=r"s1\.h5 cannot be read .*; encode that slide again"):
            ask(slides).search(slides[0].features[0], 3)


def test_without_faiss_one_is_told_what_to_install(tissue, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    line = r'FAISS is not installed; type, in your clone of .*: pip install "\.\[search\]"'
    with pytest.raises(UsageError, match=line):
        faiss_module.build([tissue(0)], tmp_path / "index")
    assert not (tmp_path / "index").exists()

"""The FAISS index of millions of patches: time, recall, memory; printed with -s.

    SEAL_EXTRACT_MILLIONS=10 pytest -m slow -s tests/genes/test_search_scale.py

makes 10 GB of features (float16, as in STAMP's layout) and 5 GB of index in the temporary folder and takes an
hour or two on one core; the default is one million. The right answers are the exact index's.
"""

import os

import pytest
from conftest import run_file

pytestmark = pytest.mark.slow


def test_an_index_of_millions_answers_quickly_and_well(tmp_path):
    pytest.importorskip("faiss")
    script = tmp_path / "scale.py"
    script.write_text(SCALE)
    millions = os.environ.get("SEAL_EXTRACT_MILLIONS", "1")
    done = run_file(script, tmp_path, millions)
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    recall = float(done.stdout.split("recall at 10 ")[1].split(",")[0])
    assert recall >= 0.95


# Embeddings of tissue lie in groups and near few directions: 2,000 centres, around each 16 directions of its
# own and a little of all. Queries are drawn likewise and are in no file.
SCALE = """
import resource, sys, time
from pathlib import Path
import numpy as np
from gene_fixtures import features_file
from seal_extract.genes.faiss_index import build, open_index
from seal_extract.genes.index import ExactIndex

folder, millions, dim, groups, directions = Path(sys.argv[1]), int(sys.argv[2]), 512, 2000, 16
rng = np.random.default_rng(0)
centres = rng.standard_normal((groups, dim), dtype=np.float32)
around = rng.standard_normal((groups, directions, dim), dtype=np.float32) / directions**0.5

def draw(count, seed):
    rng = np.random.default_rng(seed)
    group = np.sort(rng.integers(groups, size=count))
    rows = 0.2 * rng.standard_normal((count, dim), dtype=np.float32)
    z = rng.standard_normal((count, directions), dtype=np.float32)
    edges = np.searchsorted(group, np.arange(groups + 1))
    for j in range(groups):
        part = slice(edges[j], edges[j + 1])
        rows[part] += centres[j] + 0.8 * z[part] @ around[j]
    return rows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

def state(found):
    return {(one.slide.path, one.row) for one in found}

def measured(work, *args):
    start = time.perf_counter()
    return work(*args), time.perf_counter() - start

queries, per_slide, slides = draw(200, 10**6), 20_000, []
for i in range(millions * 50):
    slides.append(features_file(folder / f"features_x/s{i:04}.h5", draw(per_slide, i), dtype=np.float16))

exact, total, before = ExactIndex(slides), millions * 1_000_000, peak()
right, seconds = measured(exact.search_many, queries, 10)
_, alone = measured(exact.search, queries[0], 10)
print(f"{total:,} x {dim}, exact: {alone:.1f} s for a query, {seconds:.0f} s for {len(queries)}, "
      f"peak {peak():.2f} GB ({before:.2f} GB before)", flush=True)
before = peak()
_, building = measured(build, slides, folder / "index_x")
print(f"built in {building:.0f} s, peak {peak():.2f} GB ({before:.2f} GB before)", flush=True)
index, opening = measured(open_index, slides, folder / "index_x")
size = sum(p.stat().st_size for p in (folder / "index_x").iterdir())
for query in queries[:50]:
    index.search(query, 10)  # cells come into the system's cache
times, hits = [], 0
for q, query in enumerate(queries):
    found, took = measured(index.search, query, 10)
    times.append(took)
    hits += len(state(found) & state(right.of(q)))
ms = np.percentile(times, [50, 90, 100]) * 1000
print(f"opened in {opening:.2f} s; median {ms[0]:.0f} ms, 9 of 10 below {ms[1]:.0f} ms, slowest "
      f"{ms[2]:.0f} ms; {size / total:.0f} bytes a patch; recall at 10 {hits / len(queries) / 10:.3f}, end")
"""

"""A weight file is hashed once: what counts as the same file, and what may be wrong with the memory of it."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from encoder_fixtures import SEAL_TINY_CONCH, load, save, seal_file

from seal_extract.encoders import files
from seal_extract.encoders.files import FoundFile, WeightFile, sha256_of
from seal_extract.errors import CheckpointError

MEMORY = Path("/proc/self/mem")


class Hasher:
    """Hashes, and counts how often."""

    def __init__(self):
        self.count = 0

    def __call__(self, file):
        self.count += 1
        return hashlib.sha256(file.read()).hexdigest()


@pytest.fixture
def hasher(tmp_path, monkeypatch):
    """Files of any size and age are worth remembering, in an empty memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "WORTH_BYTES", 1)
    monkeypatch.setattr(files, "SETTLED_NS", -(10**10))
    monkeypatch.setattr(files, "_hash", Hasher())
    return files._hash


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"weights of one kind")
    return path


@pytest.fixture
def memory(tmp_path):
    path = tmp_path / "cache" / "seal_extract" / "digests.json"
    path.parent.mkdir(parents=True)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.skipif(not MEMORY.exists(), reason="only Linux has a regular file that cannot be read")
def test_a_file_that_cannot_be_read_is_one_line():
    with pytest.raises(CheckpointError, match=f"cannot read {MEMORY}: Input/output error; fetch it again"):
        WeightFile.of(FoundFile(MEMORY, "here"))


def test_the_second_time_it_is_remembered_under_any_name(hasher, weights, tmp_path):
    (tmp_path / "link.pth").symlink_to(weights)
    for path in (weights, weights, tmp_path / "link.pth"):
        assert sha256_of(path)[0] == sha256(weights)
    assert hasher.count == 1
    with pytest.raises(CheckpointError, match="is damaged"):  # held to the Hub's promise all the same
        WeightFile.of(FoundFile(weights, "lab/x", sha256="0" * 64))
    assert WeightFile.of(FoundFile(weights, "lab/x", sha256=sha256(weights))).sha256 == sha256(weights)


def test_an_encoder_loaded_twice(hasher, tmp_path, tiny_rows):
    path = save(seal_file(SEAL_TINY_CONCH), tmp_path / "whole.pth")
    first, second = (load("seal-tiny-conch", path) for _ in range(2))
    assert first.weights == second.weights
    assert (first.weights[0].sha256, hasher.count) == (sha256(path), 1)


def written_to(path):
    path.write_bytes(b"weights of 2nd kind")


def written_to_with_the_old_time(path):
    before = path.stat()
    written_to(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_one_of_the_same_time(path):
    before, other = path.stat(), path.with_name("other")
    written_to(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize(
    "change", [written_to, written_to_with_the_old_time, replaced_by_one_of_the_same_time]
)
def test_a_file_that_changed_is_hashed_again(hasher, weights, change):
    os.utime(weights, ns=(10**18, 10**18))  # long ago: whatever is written now has another time
    before, size = sha256_of(weights)[0], weights.stat().st_size
    change(weights)
    assert weights.stat().st_size == size
    assert sha256_of(weights)[0] == sha256(weights) != before


@pytest.mark.parametrize(("limit", "value"), [("SETTLED_NS", 10**12), ("WORTH_BYTES", 20)])
def test_young_and_small_files_are_not_remembered(hasher, weights, monkeypatch, tmp_path, limit, value):
    """A young one may change unseen."""
    monkeypatch.setattr(files, limit, value)
    for _ in range(2):
        assert sha256_of(weights)[0] == sha256(weights)
    assert hasher.count == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"%s": 3}', '{"%s": {"stamp": [], "sha256": "00"}}', "[" * 100_000],
    ids=["empty", "cut", "list", "null", "number", "no stamp", "deep"],
)
def test_a_memory_that_is_damaged_is_made_anew(hasher, weights, memory, content):
    memory.write_text(content.replace("%s", str(weights)))
    assert sha256_of(weights)[0] == sha256_of(weights)[0] == sha256(weights)
    assert hasher.count == 1
    assert list(json.loads(memory.read_text())) == [os.path.realpath(weights)]


@pytest.mark.parametrize("remembered", ["", "0" * 63, 7, None])
def test_what_is_no_hash_is_not_believed(hasher, weights, memory, remembered):
    sha256_of(weights)
    content = json.loads(memory.read_text())
    content[os.path.realpath(weights)]["sha256"] = remembered
    memory.write_text(json.dumps(content))
    assert sha256_of(weights)[0] == sha256(weights)


def test_a_memory_that_cannot_be_kept_is_done_without(hasher, weights, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "below", "~nobody_of_this_name"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        assert sha256_of(weights)[0] == sha256(weights)


def test_many_at_once_leave_a_whole_memory_without_the_oldest(hasher, tmp_path, memory, monkeypatch):
    paths = [tmp_path / f"{i}.pth" for i in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode())
    with ThreadPoolExecutor(8) as pool:
        assert [sha for sha, _ in pool.map(sha256_of, paths)] == [sha256(path) for path in paths]
    assert [p.name for p in memory.parent.iterdir()] == ["digests.json"]
    assert set(json.loads(memory.read_text())) <= {os.path.realpath(p) for p in paths}
    monkeypatch.setattr(files, "MAX_FILES", 3)
    memory.unlink()
    for path in paths[:5]:
        sha256_of(path)
    assert list(json.loads(memory.read_text())) == [os.path.realpath(p) for p in paths[2:5]]

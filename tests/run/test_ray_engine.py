"""Ray that is not there is one line; that it gives the same bytes is told by test_cohort_endurance."""

import re
import socket
import sys
import time

import pytest

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.ray_engine import RayEngine, _most_on_a_node, shares


def refusal(slide, encoder, tmp_path, **engine):
    with pytest.raises(UsageError) as caught:
        extract_cohort(slide, encoder, tmp_path / "out", engine=RayEngine(**engine))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ray_that_is_not_installed(drawn_slides, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = refusal(drawn_slides[0], EncoderRequest(encoder_folder), tmp_path)
    assert words == 'Ray is not installed; type, in your clone of seal-extract: pip install ".[ray]"'


def test_a_cluster_where_nobody_answers(drawn_slides, encoder_folder, tmp_path, monkeypatch):
    class Ray:
        def is_initialized(self):
            return False

    monkeypatch.setitem(sys.modules, "ray", Ray())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        words = refusal(drawn_slides[0], EncoderRequest(encoder_folder), tmp_path, address=address)
    assert words.startswith(f"no Ray cluster at '{address}' (")
    assert "Connection refused); start one with" in words


def test_encoders_that_are_loaded_are_refused(drawn_slides, encoder, tmp_path):
    assert "give their names, not loaded encoders" in refusal(drawn_slides[0], encoder, tmp_path)


def node(cores, gpus=0, alive=True):
    """A node as Ray lists it, which names no GPU where there is none."""
    return {"Alive": alive, "Resources": {"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores}}


@pytest.mark.parametrize(
    ("nodes", "asked", "given"),
    [
        ([node(16, 1), node(64)], {}, (1, 16, 1)),
        ([node(64, 8), node(16, 1)], {}, (9, 8, 1)),
        ([node(8, 2), node(4, 4), node(99, alive=False)], {}, (6, 1, 1)),
        ([node(2, 4)], {}, (2, 1, 1)),
        ([node(64), node(2)], {}, (16, 4, 0)),
        ([node(6)], {}, (1, 6, 0)),
        ([node(1)], {}, (1, 1, 0)),
        ([node(16), node(16)], {"workers": 3}, (3, 8, 0)),
        ([node(16), node(16)], {"cores": 5}, (6, 5, 0)),
        ([node(16, 2), node(64)], {"workers": 1}, (1, 16, 1)),
    ],
)
def test_each_worker_fits_on_one_node(nodes, asked, given):
    assert shares(nodes, **asked) == given


@pytest.mark.parametrize(
    ("nodes", "asked", "words"),
    [
        ([node(16), node(16)], {"cores": 20}, "have no room for 1 workers of 20 cores; leave out"),
        ([node(16, 1), node(64)], {"workers": 2}, "have no room for 2 workers of 1 cores and a GPU; leave"),
        ([node(16), node(16)], {"workers": 3, "cores": 16}, "(16 cores and 0 GPUs, 16 cores and 0 GPUs)"),
        ([], {}, "the nodes of Ray (nothing) have no room"),
    ],
)
def test_workers_that_fit_on_no_node_are_refused(nodes, asked, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        shares(nodes, **asked)


@pytest.mark.slow
def test_what_the_cluster_has_no_room_for_is_said(drawn_slides, encoder_folder, tmp_path, monkeypatch):
    """Another job holds the only core: the worker waits, and that is told while it does."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("seal_extract.run.ray_engine.WARN_S", 1.0)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        holding = ray.remote(num_cpus=1)(lambda: time.sleep(8)).remote()
        with pytest.warns(UserWarning, match="find room for 1 of 1 workers, each of 1 cores; `ray status`"):
            report = extract_cohort(
                drawn_slides[0], EncoderRequest(encoder_folder), tmp_path / "out", engine=RayEngine()
            )
        ray.get(holding)
    finally:
        ray.shutdown()
    assert len(report.done) == 1


def test_workers_of_one_node_share_the_folder_for_copies():
    assert _most_on_a_node([node(8), node(32, alive=False)], workers=9, cores=4, gpus=0) == 2
    assert _most_on_a_node([node(64, 8), node(64, 2)], workers=10, cores=8, gpus=1) == 8
    assert _most_on_a_node([node(64, 8)], workers=3, cores=8, gpus=1) == 3
    assert _most_on_a_node([], workers=3, cores=8, gpus=1) == 1

"""Ray that is not there is one line; that it gives the same bytes is told by test_cohort_endurance."""

import re
import socket
import sys
import time

import pytest
from cohort_fixtures import link_cohort

from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.run.cohort import extract_cohort
from seal_extract.run.ray_engine import RayEngine, shares


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


def nodes_of(*have):
    """Nodes as Ray lists them, of (cores, GPUs); it names no GPU where there is none."""
    resources = [{"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores} for cores, gpus in have]
    return [{"NodeID": str(i), "Alive": True, "Resources": r} for i, r in enumerate(resources)]


@pytest.mark.parametrize(
    ("have", "asked", "given"),
    [
        ([(16, 1), (64, 0)], {}, {"0": [16]}),
        ([(64, 8), (16, 1)], {}, {"0": [8] * 8, "1": [16]}),
        ([(8, 2), (4, 4)], {}, {"0": [4] * 2, "1": [1] * 4}),
        ([(2, 4)], {}, {"0": [1] * 2}),
        ([(64, 0), (2, 0)], {}, {"0": [4] * 16, "1": [2]}),
        ([(6, 0)], {}, {"0": [6]}),
        ([(16, 0), (16, 0)], {"workers": 3}, {"0": [8] * 2, "1": [16]}),
        ([(16, 0), (16, 0)], {"cores": 5}, {"0": [5] * 3, "1": [5] * 3}),
        ([(16, 2), (64, 0)], {"workers": 1}, {"0": [16]}),
        ([(16, 2), (32, 2), (64, 0)], {"workers": 2}, {"0": [16], "1": [32]}),
    ],
)
def test_each_worker_has_its_share_of_its_own_node(have, asked, given):
    places = shares(nodes_of(*have), **asked)
    assert {place.gpus for place in places} == {int(any(gpus for _, gpus in have))}
    assert {name: [p.cores for p in places if p.node == name] for name in given} == given
    assert len(places) == sum(map(len, given.values()))


def test_a_node_that_is_gone_gets_no_worker():
    nodes = nodes_of((8, 2), (99, 0))
    nodes[1]["Alive"] = False
    assert {place.node for place in shares(nodes)} == {"0"}


@pytest.mark.parametrize(
    ("have", "asked", "words"),
    [
        ([(16, 0), (16, 0)], {"cores": 20}, "have no room for 1 workers of 20 cores; leave out"),
        ([(16, 1), (64, 0)], {"workers": 2}, "have no room for 2 workers of 1 cores and a GPU; leave"),
        ([(16, 0), (16, 0)], {"workers": 3, "cores": 16}, "(16 cores and 0 GPUs, 16 cores and 0 GPUs)"),
        ([], {}, "the nodes of Ray (nothing) have no room"),
    ],
)
def test_workers_that_fit_on_no_node_are_refused(have, asked, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        shares(nodes_of(*have), **asked)


@pytest.mark.parametrize(("gpus", "precision"), [(1, "float16"), (0, "float32")])
def test_the_cluster_decides_on_the_precision_not_the_machine_of_the_driver(gpus, precision, monkeypatch):
    """A finished slide is recognised by the precision that the workers compute in."""

    class Ray:
        started = False
        is_initialized = classmethod(lambda cls: cls.started)
        init = classmethod(lambda cls, **_: setattr(cls, "started", True))
        shutdown = classmethod(lambda cls: setattr(cls, "started", False))
        nodes = staticmethod(lambda: nodes_of((8, 0), (8, gpus)))

    monkeypatch.setitem(sys.modules, "ray", Ray)
    asked = [EncoderRequest("conch"), EncoderRequest("conch", precision="bfloat16")]
    placed = RayEngine("auto").placed(asked)
    assert [request._precision for request in placed] == [precision, "bfloat16"]
    assert placed[1] == asked[1]
    assert not Ray.started
    assert RayEngine().placed(asked) == asked  # a cluster that this machine will start


@pytest.mark.slow
def test_what_the_cluster_has_no_room_for_is_said(drawn_slides, encoder_folder, tmp_path, monkeypatch):
    """Another job holds the only core: the worker waits, and that is told while it does."""
    ray = pytest.importorskip("ray")
    for module in ("ray_engine", "workers"):
        monkeypatch.setattr(f"seal_extract.run.{module}.WARN_S", 1.0)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        holding = ray.remote(num_cpus=1)(lambda: time.sleep(8)).remote()
        with pytest.warns(UserWarning, match="find room for the worker of 1 cores; `ray status` shows"):
            report = extract_cohort(
                drawn_slides[0], EncoderRequest(encoder_folder), tmp_path / "out", engine=RayEngine()
            )
        ray.get(holding)
    finally:
        ray.shutdown()
    assert len(report.done) == 1


@pytest.mark.slow
def test_on_a_mixed_cluster_only_the_node_with_gpus_works(drawn_slides, encoder_folder, tmp_path):
    """One core and a GPU that is pretended, beside four cores and none: a worker of the one core."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    import ray

    cluster = cluster_utils.Cluster(True, head_node_args={"num_cpus": 4, "num_gpus": 0})
    gpu_node = cluster.add_node(num_cpus=1, num_gpus=1).node_id
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        assert [(p.node, p.cores, p.gpus) for p in shares(ray.nodes())] == [(gpu_node, 1, 1)]
        request = EncoderRequest(encoder_folder, device="cpu")
        slides = link_cohort(tmp_path / "slides", drawn_slides, 3)
        report = extract_cohort(slides, request, tmp_path / "out", engine=RayEngine())
        assert len(report.done) == 3
    finally:
        ray.shutdown()
        cluster.shutdown()

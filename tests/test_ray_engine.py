"""Ray that is not there is one line; that it gives the same bytes is told by test_cohort_endurance."""

import socket
import sys

import pytest

from seal_extract.cohort import extract_cohort
from seal_extract.encoders.request import EncoderRequest
from seal_extract.errors import UsageError
from seal_extract.ray_engine import RayEngine, _most_on_a_node


def refusal(slide, encoder, tmp_path, **engine):
    with pytest.raises(UsageError) as caught:
        extract_cohort(slide, encoder, tmp_path / "out", engine=RayEngine(**engine))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_ray_that_is_not_installed(drawn_slides, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = refusal(drawn_slides[0], EncoderRequest(encoder_folder), tmp_path)
    assert words == 'Ray is not installed; type: pip install "seal-extract[ray]"'


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


def test_workers_of_one_node_share_the_folder_for_copies():
    def node(cores, gpus=0, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores}}

    assert _most_on_a_node([node(8), node(32, alive=False)], workers=9, cores=4, gpus=0) == 2
    assert _most_on_a_node([node(64, 8), node(64, 2)], workers=10, cores=8, gpus=1) == 8
    assert _most_on_a_node([node(64, 8)], workers=3, cores=8, gpus=1) == 3
    assert _most_on_a_node([], workers=3, cores=8, gpus=1) == 1

"""Storages of this machine: ``memory://``, and a web server that can be told to misbehave."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest


@pytest.fixture
def memory():
    """The files of memory://, by path."""
    storage = fsspec.filesystem("memory")
    storage.rm("/", recursive=True)
    yield storage
    storage.rm("/", recursive=True)


class Site(SimpleHTTPRequestHandler):
    """A folder on the web that counts what is fetched and can be told to misbehave."""

    def do_HEAD(self):
        return self.lead() or super().do_HEAD()

    def lead(self):
        """Send whoever asks for one of these paths elsewhere."""
        to = next((to for start, to in self.server.leads_to.items() if self.path.startswith(start)), None)
        if to is not None:
            self.send_response(302)
            self.send_header("Location", to)
            self.end_headers()
        return to

    def translate_path(self, path):
        return super().translate_path(path.partition(";")[0])

    def do_GET(self):
        self.server.fetched.append(self.path)
        if self.lead():
            return None
        failing = next(
            (start for start, times in self.server.fails.items() if times and self.path.startswith(start)),
            None,
        )
        if failing is not None:
            self.server.fails[failing] -= 1
            return self.send_error(503)
        self.server.held.set()
        self.server.go_on.wait(10)
        if self.server.cut_after is None:
            return super().do_GET()
        source = self.send_head()
        self.wfile.write(source.read(self.server.cut_after))
        source.close()
        self.close_connection = True

    def send_header(self, keyword, value):
        if keyword not in self.server.without:
            super().send_header(keyword, value)

    def send_error(self, code, *args):
        super().send_error(self.server.missing_code if code == 404 else code, *args)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    """Serve ``tmp_path / "www"``."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=str(tmp_path / "www"))) as server:
        server.fetched, server.cut_after, server.without, server.leads_to = [], None, (), {}
        server.missing_code = 404
        server.fails = {}  # how often, by the beginning of the path
        server.held, server.go_on = threading.Event(), threading.Event()
        server.go_on.set()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()

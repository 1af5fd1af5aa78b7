"""Weights by address and by official name; the server is one on this machine."""

import hashlib
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from checkpoint import load_weights, model_from_checkpoint, save_checkpoint
from evaluate import default_output
from reading.downloads import OFFICIAL, find_weights
from runtime.errors import InputError
from sparse_set import SMALLEST, tiny_model

pytestmark = pytest.mark.usefixtures("four_convolutions")
CONTENT = bytes(range(256)) * 9
DIGEST = hashlib.sha256(CONTENT).hexdigest()[:8]


class Handler(SimpleHTTPRequestHandler):
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if "cut" in self.path:  # says more bytes than it sends
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT) + 5))
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """https addresses are answered by a local server with the files of tmp_path/served."""
    served = tmp_path / "served"
    served.mkdir()
    for name in ("model.pt", f"model-{DIGEST}.pt", "model-00000000.pt", "a b.pt"):
        (served / name).write_bytes(CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=served))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # polls every 10 ms
    open_url = urllib.request.urlopen
    local = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(
        urllib.request,
        "urlopen",
        lambda url, timeout: open_url(url.replace("https://example.org", local), timeout=timeout),
    )
    monkeypatch.setattr(Handler, "requests", [])
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    yield Handler.requests
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name, file",
    [
        ("model.pt", "model.pt"),
        (f"model-{DIGEST}.pt?download=1", f"model-{DIGEST}.pt"),
        ("folder/../a%20b.pt", "a b.pt"),
    ],
)
def test_a_file_is_downloaded_once(requests, tmp_path, name, file):
    for _ in range(2):
        path = find_weights(f"https://example.org/{name}")
        assert path == tmp_path / "cache/hub/checkpoints" / file and path.read_bytes() == CONTENT
    assert len(requests) == 1


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.pt", "cannot be downloaded: File not found; to work offline, put the file into"),
        ("cut.pt", "has 2309 bytes, of which 2304 arrived"),
        ("model-00000000.pt", f"SHA-256 {DIGEST}.* promises 00000000"),
        ("", "names no file"),
    ],
)
def test_a_failed_download_leaves_nothing(requests, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        find_weights(f"https://example.org/{name}")
    assert not list(tmp_path.glob("cache/hub/checkpoints/*"))


def test_official_files_are_told_with_their_link(tmp_path):
    for name in ("grattvis_r50_ovis.pth", "grattvis_r50_ovis"):
        with pytest.raises(
            InputError,
            match=rf"drive.google.com.*{OFFICIAL['grattvis_r50_ovis.pth']}"
            rf".* save it as .*grattvis_r50_ovis.pth",
        ):
            find_weights(tmp_path / name)
    (tmp_path / "grattvis_r50_ovis.pth").write_bytes(b"")
    for path in (tmp_path / "grattvis_r50_ovis.pth", Path("runs/last.pt")):
        assert find_weights(path) == path
    assert len(OFFICIAL) == 17 and len(set(OFFICIAL.values())) == 17


def test_programs_take_addresses_and_official_names(requests, tmp_path, monkeypatch):
    """The model is that of the file; evaluation writes to runs/, not into the cache."""
    model, loaded = tiny_model(**SMALLEST), tiny_model(seed=1, **SMALLEST)
    save_checkpoint(tmp_path / "served/own.pt", {"model": model.state_dict()})
    assert not load_weights(loaded, "https://example.org/own.pt").missing
    found = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value)
    loaded, _ = model_from_checkpoint("https://example.org/own.pt", "toy", "gated", **SMALLEST)
    assert loaded.num_classes == 3
    assert default_output("https://example.org/own.pt") == Path("runs/own/evaluation")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="drive.google.com"):
        model_from_checkpoint("vita_r50_ovis.pth", "r50")

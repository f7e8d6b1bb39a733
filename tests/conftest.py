"""What the tests share: generated images, a tiny backbone, the command line in this process, the real photographs."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.errors import WeightsUnavailableError
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

COUNTER = count()
COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def draw_photo(colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A noisy picture of one colour: easy to tell apart, never twice the same bytes."""
    noise = np.random.default_rng(seed).integers(-40, 40, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def fill_class(folder: Path, colour: tuple[int, int, int], n: int, seed: int) -> None:
    """n JPEG files in a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        draw_photo(colour, seed + i).save(folder / f"photo_{i:03d}.jpg", quality=90)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """DATA/{train,val}/{blue,red}: 6 + 3 generated photographs of each class."""
    root = tmp_path / "photos"
    for s, (split, n) in enumerate({"train": 6, "val": 3}.items()):
        for c, name in enumerate(("blue", "red")):
            fill_class(root / split / name, COLOURS[name], n, seed=1000 * s + 100 * c)
    return root


@pytest.fixture
def flat_photos(tmp_path: Path) -> Path:
    """DATA/{blue,green,red}: 20 generated photographs of each class, no split folders."""
    root = tmp_path / "flat"
    for c, (name, colour) in enumerate(COLOURS.items()):
        fill_class(root / name, colour, 20, seed=5000 + 100 * c)
    return root


class TinyNetwork(nn.Module):
    """A convolution, a BatchNorm, a pool and a classifier: everything that matters, in microseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(images))).mean((2, 3)))


class TinyFamily:
    """A family of backbones like any other, with one network, "tiny", of 8 features from 16 x 16 pixels."""

    calls = 0  # forward passes of all tiny networks, in images

    def list_names(self) -> list[str]:
        return ["tiny"]

    def list_weights(self, name: str) -> list[WeightsEntry]:
        return [WeightsEntry(name="TINY_V1")]

    def list_options(self, name: str, entry: str | None) -> dict[str, Any]:
        return {}

    def make_network(self, name: str, options: Mapping[str, Any]) -> nn.Module:
        network = TinyNetwork()
        network.conv.register_forward_hook(self._count)
        return network

    def describe_input(self, name: str, entry: str | None, network: nn.Module) -> InputFormat:
        return InputFormat(input_size=(16, 16), resize=20, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))

    def read_weights(self, name: str, entry: str, progress: Progress) -> WeightsFile:
        raise WeightsUnavailableError("tiny has no default weights")

    @classmethod
    def _count(cls, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        cls.calls += 0 if inputs[0].is_meta else len(inputs[0])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[TinyFamily]:
    """Make the backbone "tiny" known (use it with weights="none"), its forward passes counted from 0."""
    from featcache.backbones import families

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, TinyFamily()))
    TinyFamily.calls = 0
    return TinyFamily


@pytest.fixture(autouse=True)
def memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test remembers what another one did, or its user."""
    from featcache import recall, storage

    path = tmp_path_factory.getbasetemp() / "memory" / f"{next(COUNTER)}.json"
    monkeypatch.setattr(recall, "memory_path", lambda: path)
    monkeypatch.setattr(storage, "copies_path", lambda: path.with_suffix(".copies"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread inside torch: small networks are faster so, and sums come in one order. Given back in any case."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not rendered, which takes longer than a small training: their files are there, and blank."""
    blank = io.BytesIO()
    Image.new("L", (1, 1)).save(blank, "PNG")
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, path, **how: Path(path).write_bytes(blank.getvalue())
    )


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """Serve a folder on this machine; gives its address."""
    servers: list[ThreadingHTTPServer] = []

    def serve(folder: Path) -> str:
        http = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
        servers.append(http)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{http.server_port}"

    yield serve
    for http in servers:
        http.shutdown()
        http.server_close()


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run `featcache ARGUMENTS...` in this process, in an empty folder: exit code, stdout, stderr."""
    from featcache.cli import run

    (tmp_path / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "cwd")
    for name in [name for name in os.environ if name.startswith("FEATCACHE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@dataclass(frozen=True)
class Store:
    """An S3-compatible server on this machine, and an empty bucket in it."""

    endpoint: str
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3-compatible server that runs as long as the tests do."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The server, found by its environment variables in child processes too, and an empty bucket of this test alone."""
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="pip install 'featcache[s3]'")
    variables = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store = Store(s3_endpoint, f"bucket-{next(COUNTER)}")
    fsspec.filesystem("s3").mkdir(store.bucket)
    return store


def find_real_data(name: str) -> Path:
    """A set of real photographs, or a skip that says why."""
    folder = Path(os.environ.get("FEATCACHE_TEST_DATA", "../shared/data")).resolve() / name
    if not folder.is_dir():
        pytest.skip(f"no real photographs at {folder}: set FEATCACHE_TEST_DATA to the folder that holds {name}")
    return folder


@pytest.fixture(scope="session")
def hymenoptera() -> Path:
    """The real ants and bees: 244 + 153 photographs and a stray GIF."""
    return find_real_data("hymenoptera_data")


@pytest.fixture(scope="session")
def imagenette() -> Path:
    """Ten classes of ImageNet, 200 + 50 photographs each."""
    return find_real_data("imagenette160_subset")


LINES: list[str] = []  # counts of what was tried, printed as the last lines of the whole run


@pytest.fixture(scope="session")
def tell() -> Callable[[str], None]:
    """Keep a line for the end of the run."""
    return LINES.append


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether this is the long form: FEATCACHE_FAULTS=long, as `scripts/faults` has it."""
    return os.environ.get("FEATCACHE_FAULTS") == "long"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its lines to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["lines"] = LINES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The lines of a worker that is done."""
    LINES.extend(getattr(node, "workeroutput", {}).get("lines", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The counts."""
    if LINES:
        terminalreporter.section("faults", sep="-")
        for line in LINES:
            terminalreporter.line(line)

"""A user's code as a digest: whatever changes what the network computes changes it, and nothing else does."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from featcache import InputFormat, wrap_network
from featcache.backbones import check_unchanged
from featcache.backbones.code import hash_code
from featcache.errors import BackboneError

HEAD = """
import functools, json, types
import torch
from torch import fx, nn
import helper
from helper import twice

FACTOR = 2.0
NAMES = {"a", "b", "c", "d"}

class Net(nn.Module):
    def __init__(self, k=2.0):
        super().__init__()
        self.conv, self.pool, self.k = nn.Conv2d(3, 8, 3, stride=4), nn.AdaptiveAvgPool2d(1), k
    def forward(self, x):
        return self.pool(self.conv(x) * self.k).flatten(1)

def make():
    torch.manual_seed(0)
    net = Net()
"""
# What the function does besides, and a change of it: in the file itself unless another is named.
CHANGES = {
    "a hook": ("net.conv.register_forward_hook(lambda m, i, o: o * 2)", "o * 2", "o * 30"),
    "a hook's function elsewhere": ("net.conv.register_forward_hook(helper.hook)", "helper.py: o + 1", "o + 5"),
    "a bound method": ("net.forward = types.MethodType(lambda self, x: Net.forward(self, x) * 2, net)", "* 2", "* 9"),
    "a traced network": ("net = fx.symbolic_trace(Net(FACTOR))", "FACTOR = 2.0", "FACTOR = 50.0"),
    "an attribute": ("net.k = FACTOR", "FACTOR = 2.0", "FACTOR = 50.0"),
    "an attribute that is a tensor": ("net.k = torch.full((8, 1, 1), FACTOR)", "FACTOR = 2.0", "FACTOR = 50.0"),
    "a buffer that is not saved": (
        'net.register_buffer("j", torch.tensor(json.load(open("cfg.json"))), persistent=False)',
        "cfg.json: 2.0",
        "50.0",
    ),
    "an imported function": ("net.k = twice", "helper.py: x * 2", "x * 3"),
    "what an imported function calls": ("net.k = helper.thrice", "helper.py: x + x", "x - x"),
    "a closure": ("f = 2.0; net.conv.register_forward_hook(lambda m, i, o: o * f)", "f = 2.0", "f = 3.0"),
    "a default": ("net.conv.register_forward_hook(lambda m, i, o, f=2.0: o * f)", "f=2.0", "f=3.0"),
    "a partial": (
        "net.conv.register_forward_hook(functools.partial(helper.scaled, 2.0))",
        "(helper.scaled, 2.0",
        "(helper.scaled, 3.0",
    ),
    "the class": ("pass", "* self.k", "* self.k * 2"),
    "a constant that the class names": ("net.k = helper.Named()", "helper.py: LIMIT = 1", "LIMIT = 2"),
}
HELPER = """
LIMIT = 1
def inner(x): return x + x
def twice(x): return x * 2
def thrice(x): return inner(x) + x
def hook(m, i, o): return o + 1
def scaled(f, m, i, o): return o * f
class Named:
    def __call__(self, x): return x * LIMIT
"""
PROGRAM = "import nets; from featcache.backbones.code import hash_code; print(hash_code(nets.make()))"


def hash_in_a_process(folder: Path) -> str:
    """The digest that a fresh process finds, with its own order of sets."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "random"},
    )  # fmt: skip
    return result.stdout.strip()


def write(folder: Path, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nets.py").write_text(f"{HEAD}    {body}\n    net.names = NAMES\n    return net\n")
    (folder / "helper.py").write_text(HELPER)
    (folder / "cfg.json").write_text("2.0")


# A process of its own takes seconds because of torch: all changes are made in one, module by module.
LOADER = """
import importlib.util, sys
from pathlib import Path
from featcache.backbones.code import hash_code
import os
def load(folder):
    os.chdir(folder)
    for name in ("helper", "nets"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return hash_code(module.make())
for folder in map(Path, sys.argv[1:]):
    print(load(folder.resolve()))
"""


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """Digest of each variant before its change, elsewhere with other lines, and after it."""
    root = tmp_path_factory.mktemp("code")
    folders = []
    for i, (body, old, new) in enumerate(CHANGES.values()):
        elsewhere_file, colon, text = old.partition(": ")
        file, text = (elsewhere_file, text) if colon else ("nets.py", old)
        before, elsewhere, after = (root / f"{i}" / place for place in ("before", "elsewhere", "after"))
        for folder in (before, elsewhere, after):
            write(folder, body)
        (elsewhere / "nets.py").write_text("# moved\n\n\n" + (elsewhere / "nets.py").read_text())
        changed = (after / file).read_text()
        assert text in changed
        (after / file).write_text(changed.replace(text, new))
        folders += [before, elsewhere, after]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADER), *map(str, folders)], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    lines = result.stdout.split()
    return {name: tuple(lines[3 * i : 3 * i + 3]) for i, name in enumerate(CHANGES)}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_what_is_computed_changes_the_digest(
    name: str, digests: dict[str, tuple[str, str, str]]
) -> None:
    before, elsewhere, after = digests[name]
    assert before == elsewhere
    assert before != after


def test_two_processes_find_the_same(tmp_path: Path) -> None:
    write(tmp_path, "net.conv.register_forward_hook(helper.hook); net.k = twice")
    assert hash_in_a_process(tmp_path) == hash_in_a_process(tmp_path)


def test_a_class_without_a_file_is_read_from_memory() -> None:
    digests = []
    for factor in ("2", "30"):
        room: dict[str, type[nn.Module]] = {}
        exec(f"from torch import nn\nclass Net(nn.Module):\n    def forward(self, x): return x * {factor}", room)
        digests.append(hash_code(room["Net"]()))
    assert digests[0] != digests[1]


class Scaled(nn.Module):
    """Means of the channels times a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 2.0

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.k


IMAGES = InputFormat(input_size=(8, 8), mean=(0.5,), std=(0.5,))


def test_an_attribute_that_changes_after_wrapping_is_noticed() -> None:
    network = Scaled()
    backbone = wrap_network(network, IMAGES)
    check_unchanged(backbone)
    network.k = 50.0
    with pytest.raises(BackboneError, match="the weights or code of Scaled have changed since it was wrapped"):
        check_unchanged(backbone)
    assert wrap_network(network, IMAGES).options != backbone.options


def test_running_a_network_changes_nothing() -> None:
    backbone = wrap_network(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()), IMAGES
    )
    with torch.inference_mode():
        backbone.network(torch.randn(2, 3, 8, 8))
    check_unchanged(backbone)

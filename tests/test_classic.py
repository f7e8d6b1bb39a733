"""The classic recipe, written out plainly, and `featcache finetune`: the same weights, bit for bit, on photographs.

https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import featcache

NORMALISE = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
TRANSFORMS = {
    "train": transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *NORMALISE]),
    "val": transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *NORMALISE]),
}


def train_classically(network: nn.Module, folder: Path, epochs: int, batch_size: int, seed: int) -> dict[str, Any]:
    """The tutorial's `train_model`; gives the state of the best epoch."""
    torch.manual_seed(seed)
    network.fc = nn.Linear(network.fc.in_features, 2)
    data = {name: datasets.ImageFolder(str(folder / name), TRANSFORMS[name]) for name in ("train", "val")}
    loaders = {name: DataLoader(data[name], batch_size=batch_size, shuffle=name == "train") for name in data}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    best_accuracy, best_state = -1.0, {}
    for _ in range(epochs):
        for phase in ("train", "val"):
            network.train(phase == "train")
            right = 0
            for inputs, labels in loaders[phase]:
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == "train"):
                    outputs = network(inputs)
                    loss = nn.functional.cross_entropy(outputs, labels)
                    if phase == "train":
                        loss.backward()
                        optimizer.step()
                right += int((outputs.argmax(1) == labels).sum())
            if phase == "train":
                scheduler.step()
        if right / len(data["val"]) > best_accuracy:
            best_accuracy, best_state = right / len(data["val"]), copy.deepcopy(network.state_dict())
    return best_state


@pytest.fixture
def some_photos(hymenoptera: Path, tmp_path: Path) -> Path:
    """DATA/{train,val}/{ants,bees}: 7 + 4 of the real photographs of each class."""
    for split, n in (("train", 7), ("val", 4)):
        for name in ("ants", "bees"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for path in sorted((hymenoptera / split / name).glob("*.jpg"))[:n]:
                (tmp_path / "photos" / split / name / path.name).symlink_to(path)
    return tmp_path / "photos"


def test_two_epochs_give_the_weights_of_the_plain_loop_bit_for_bit(some_photos: Path, tmp_path: Path) -> None:
    batch_size, seed = 5, 3  # the last batch is a short one
    torch.manual_seed(11)
    plain = models.resnet18()
    torch.save(plain.state_dict(), tmp_path / "w.pth")
    expected = train_classically(plain, some_photos, 2, batch_size, seed)
    run = featcache.finetune(
        some_photos,
        tmp_path / "run",
        weights=str(tmp_path / "w.pth"),
        epochs=2,
        batch_size=batch_size,
        seed=seed,
        workers=0,
        select_on="val",
    )
    found = load_file(run.folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert "optimistic" in run.record.selection
    again = models.resnet18(num_classes=2)
    again.load_state_dict(found)
    plain.load_state_dict(expected)
    images = torch.randn(3, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(again.eval()(images), plain.eval()(images))

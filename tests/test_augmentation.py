"""featcache.augmentation: training transforms, mixing, and the order of an epoch with a seed for each image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import draw_photo, fill_class
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from featcache.augmentation import Draw, TrainingOrder, TrainingRows, make_mix, make_training_transform, seeded
from featcache.images import make_evaluation_transform, make_loader
from featcache.preprocessing import Preprocessing

SMALL = Preprocessing(resize=20, crop=16, mean=(0.5,) * 3, std=(0.25,) * 3)


# --- transforms -------------------------------------------------------------------------------------------------------


def test_no_augmentation_is_what_evaluation_does() -> None:
    image = draw_photo((90, 80, 20), 1)
    expected = make_evaluation_transform(SMALL)(image)
    assert torch.equal(make_training_transform(SMALL, "none")(image), expected)


@pytest.mark.parametrize("augment", ["crop", "randaugment", "trivialaugment"])
def test_augmented_images_have_the_right_shape_and_differ_each_time(augment: str) -> None:
    transform, image = make_training_transform(SMALL, augment), draw_photo((90, 80, 20), 1)
    torch.manual_seed(0)
    views = [transform(image) for _ in range(6)]
    assert all(view.shape == (3, 16, 16) and view.dtype == torch.float32 for view in views)
    assert all(not torch.equal(views[0], view) for view in views[1:])
    torch.manual_seed(0)
    assert torch.equal(transform(image), views[0])


@pytest.mark.parametrize("augment", ["randaugment", "trivialaugment"])
def test_the_stronger_ones_reach_what_crops_do_not(augment: str) -> None:
    flat = draw_photo((120, 120, 120), 0).resize((1, 1)).resize((40, 40))  # one colour: no crop changes it
    torch.manual_seed(0)
    plain = {tuple(make_training_transform(SMALL)(flat).mean((1, 2)).tolist()) for _ in range(20)}
    strong = {tuple(make_training_transform(SMALL, augment)(flat).mean((1, 2)).tolist()) for _ in range(20)}
    assert len(plain) == 1
    assert len(strong) > 3


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_mixed_labels_are_shares_of_the_classes_that_fit_the_images(mixup: float, cutmix: float) -> None:
    mix = make_mix(mixup, cutmix, 3)
    assert mix is not None
    labels = torch.tensor([0, 1, 2, 1])
    images = torch.nn.functional.one_hot(labels, 3).float()[:, :, None, None].expand(4, 3, 32, 32)
    torch.manual_seed(0)
    for _ in range(5):
        mixed, shares = mix(images, labels)
        assert shares.shape == (4, 3)
        assert shares.sum(1).tolist() == pytest.approx([1] * 4)
        torch.testing.assert_close(mixed.mean((2, 3)), shares, atol=1e-5, rtol=0)


def test_without_alphas_nothing_is_mixed() -> None:
    assert make_mix(0, 0, 3) is None


# --- the order of an epoch --------------------------------------------------------------------------------------------


def list_epoch(order: TrainingOrder, epoch: int, **where: object) -> list[list[int]]:
    order.begin(epoch, **where)
    return [[one.row if isinstance(one, Draw) else one for one in batch] for batch in order]


def test_every_epoch_has_every_row_once_in_another_order_that_the_seed_decides() -> None:
    order = TrainingOrder(23, 5, seed=1)
    first, second = list_epoch(order, 1), list_epoch(order, 2)
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3] == [len(batch) for batch in second]
    for epoch in (first, second):
        assert sorted(row for batch in epoch for row in batch) == list(range(23))
    assert first != second
    assert list_epoch(TrainingOrder(23, 5, seed=1), 2) == second
    assert list_epoch(TrainingOrder(23, 5, seed=2), 2) != second


def test_the_global_stream_is_left_alone_but_for_one_stream() -> None:
    before = torch.get_rng_state()
    list_epoch(TrainingOrder(9, 2, seed=0), 1)
    assert torch.equal(torch.get_rng_state(), before)
    list_epoch(TrainingOrder(9, 2, seed=0, one_stream=True), 1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_one_stream_is_the_order_of_a_plain_data_loader() -> None:
    torch.manual_seed(4)
    expected = [batch.tolist() for (batch,) in DataLoader(TensorDataset(torch.arange(11)), batch_size=3, shuffle=True)]
    torch.manual_seed(4)
    torch.empty((), dtype=torch.int64).random_()  # what a loader draws when it begins
    assert list_epoch(TrainingOrder(11, 3, seed=0, one_stream=True), 1) == expected


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 12), size=st.integers(1, 5), epoch=st.integers(1, 3))
def test_several_processes_share_every_batch_and_nobody_is_without_an_image(
    n: int, batch_size: int, size: int, epoch: int
) -> None:
    whole = list_epoch(TrainingOrder(n, batch_size, seed=3), epoch)
    orders = [TrainingOrder(n, batch_size, seed=3, rank=rank, size=size) for rank in range(size)]
    for order in orders:
        order.begin(epoch)
    shares = [list(order) for order in orders]
    assert len({len(share) for share in shares}) == 1
    for i, rows in enumerate(whole):
        batch = [share[i] for share in shares]
        assert all(batch)
        counting = [one for part in batch for one in part if one.counts]
        assert sorted(one.row for one in counting) == sorted(rows)
    seeds = {one.row: one.seed for share in shares for part in share for one in part if one.counts}
    alone = [one for batch in TrainingOrder(n, batch_size, seed=3) for one in batch] if epoch == 1 else []
    assert all(seeds[one.row] == one.seed for one in alone)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 30), batch_size=st.integers(1, 9), one_stream=st.booleans(), data=st.data())
def test_an_epoch_goes_on_where_it_was_left(n: int, batch_size: int, one_stream: bool, data: st.DataObject) -> None:
    torch.manual_seed(0)
    order = TrainingOrder(n, batch_size, seed=5, one_stream=one_stream)
    order.begin(2)
    whole = list(order)
    done = data.draw(st.integers(0, len(whole)))
    again = TrainingOrder(n, batch_size, seed=5, one_stream=one_stream)
    again.begin(2, done, order.order)
    assert list(again) == whole[done:]


# --- random numbers of each image -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill_class(tmp_path, (90, 80, 20), 9, seed=0)
    return tmp_path


def load_epoch(folder: Path, workers: int, batch_size: int = 4) -> dict[int, torch.Tensor]:
    """The image of every row."""
    paths = sorted(path.name for path in folder.glob("*.jpg"))
    rows = TrainingRows(folder, paths, transform=make_training_transform(SMALL), labels=list(range(len(paths))))
    order = TrainingOrder(len(paths), batch_size, seed=7)
    order.begin(3)
    loader = make_loader(rows, batches=order, workers=workers, generator=torch.Generator())
    return {
        row: image
        for batch in loader
        for row, image, label in zip(batch.rows.tolist(), batch.images, batch.labels.tolist(), strict=True)
        if row == label
    }


def test_images_are_augmented_alike_whatever_the_workers_and_the_batches(folder: Path) -> None:
    here = load_epoch(folder, workers=0)
    assert len(here) == 9
    for other in (load_epoch(folder, workers=2), load_epoch(folder, workers=0, batch_size=2)):
        assert all(torch.equal(here[row], other[row]) for row in here)


def test_the_stream_outside_goes_on_as_if_nothing_were(folder: Path) -> None:
    before = torch.get_rng_state()
    load_epoch(folder, workers=0)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(5):
        first = torch.rand(3)
    with seeded(5):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_that_does_not_count_has_the_label_that_says_so(folder: Path) -> None:
    rows = TrainingRows(folder, ["photo_000.jpg"], transform=make_training_transform(SMALL), labels=[1])
    assert rows[Draw(0, 9)][2] == 1
    assert rows[Draw(0, 9, counts=False)][2] == -100

"""The benchmark of the loader compares like with like, and says where it cannot."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loader
from datasets import build_dataset, build_loader
from runtime.seeding import seed_everything


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    loader.write_photos(tmp_path / "val" / "class", 2)
    loader.write_photos(tmp_path / "train" / "class", 2)
    return sorted(tmp_path.glob("train/class/*"))


def finish(pipeline: loader.Pipeline, photo: Path) -> torch.Tensor:
    """An image by all stages, with a random state that is known before the crop and after it."""
    value: Any = photo
    for one in pipeline:
        for stage, step in one.stages.items():
            if stage in ("crop and resize", "augment"):
                seed_everything(0)
            value = step(value)
    return value


@pytest.mark.parametrize("is_train", [True, False])
def test_the_compared_pipelines_give_the_same_images(photos: list[Path], is_train: bool) -> None:
    for photo in photos:
        plain, *exact, ours = (finish(pipeline, photo) for pipeline in loader.pipelines(is_train).values())
        assert plain.shape == (3, 224, 224)
        assert all(torch.equal(image, plain) for image in exact)
        assert torch.equal(ours, plain) is not is_train
        assert ((ours - plain).abs() < 0.1).float().mean() > 0.98  # a policy's threshold can turn a rounding into more


@pytest.mark.parametrize("is_train", [True, False])
def test_what_is_measured_is_what_the_loader_does(photos: list[Path], is_train: bool) -> None:
    deit = loader.recipe()
    data = replace(deit.data, data_set="IMNET", data_path=str(photos[0].parents[2]), batch_size=2, num_workers=0)
    settings = replace(deit, data=data, augmentation=replace(deit.augmentation, repeated_aug=False))
    images, _ = build_dataset(is_train, settings)
    batches = build_loader(images, is_train, settings, 0, 1)
    ((batch, _),) = batches
    *_, ours = loader.pipelines(is_train).values()
    measured: dict[int, Any] = {number: Path(images.cropped.samples[index][0]) for index, _, number in batches.sampler}
    loader.load(ours, measured, 0, np.zeros((len(loader.STAGES), 2)))
    assert torch.equal(batch, torch.stack(list(measured.values())))


def test_every_stage_is_measured_and_the_table_sums_them(photos: list[Path]) -> None:
    times = loader.measure(True, 2, photos)
    names = list(loader.pipelines(True))
    assert times.shape == (2, len(names), len(loader.STAGES), 2)
    assert (times[:, 0, 0] == 0).all()  # the plain pipeline does not seed each image
    assert (times[:, 1:, 0] > 0).all()
    assert (times[:, :, 1:] > 0).all()

    times = np.ones_like(times)
    times[:, 0] = 3
    rows = {row.pop("per image"): list(row.values()) for row in loader.rows_of(names, times)}
    assert [float(cell) for cell in rows["decode, ms"]] == [3, 1, 1]
    assert rows["all, ms"] == ["18.000 ± 0.000", *["6.000 ± 0.000"] * 2]
    assert [cell.split()[0] for cell in rows["images/s of a core's time"]] == ["56", "167", "167"]
    assert [cell.split()[0] for cell in rows["times as fast"]] == ["1.00", "3.00", "3.00"]


def test_a_folder_without_enough_jpegs_is_named(tmp_path: Path, photos: list[Path], monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["loader", "--data-path", str(tmp_path / "val"), "--workers", "3"])
    with pytest.raises(SystemExit):
        loader.main()
    assert f"2 JPEGs in --data-path {tmp_path / 'val'} are too few for --workers 3" in capsys.readouterr().err

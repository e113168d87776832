"""The benchmark of the loader compares like with like, and says where it cannot."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import loader
from datasets import build_dataset, build_loader
from loading import images
from runtime.seeding import seed_everything


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
    loader.write_photos(tmp_path / "val" / "class", 2)
    loader.write_photos(tmp_path / "train" / "class", 2)
    return sorted(tmp_path.glob("train/class/*"))


def batch_of(pipeline: loader.Pipeline, photo: Path) -> torch.Tensor:
    """A batch of one image, with a random state that is known before each random stage."""

    def seeded(step: Any) -> Any:
        return lambda value: seed_everything(0) or step(value)

    stages = {
        stage: seeded(step) if stage in ("crop and resize", "augment and collate", "normalise and erase") else step
        for stage, step in pipeline.stages.items()
    }
    batch_stages = {stage: seeded(step) for stage, step in pipeline.batch_stages.items()}
    times = np.zeros((len(loader.STAGES), 2))
    return loader.load_batch(replace(pipeline, stages=stages, batch_stages=batch_stages), {(0, 0): photo}, times)


@pytest.mark.parametrize("is_train", [True, False])
def test_the_compared_pipelines_give_the_same_images(photos: list[Path], monkeypatch, is_train: bool) -> None:
    monkeypatch.setattr(images, "seed_everything", lambda *place: seed_everything(0))
    for photo in photos:
        plain, *exact, ours = (batch_of(pipeline, photo) for pipeline in loader.pipelines(is_train).values())
        assert plain.shape == (1, 3, 224, 224)
        for image in exact:
            torch.testing.assert_close(
                image, plain, atol=1e-6, rtol=1e-6
            )  # timm's prefetching loader scales mean and std
        assert torch.equal(ours, plain) is not is_train
        assert ((ours - plain).abs() < 0.1).float().mean() > 0.98  # a policy's threshold can turn a rounding into more


@pytest.mark.parametrize("is_train", [True, False])
def test_what_is_measured_is_what_the_loader_does(photos: list[Path], is_train: bool) -> None:
    deit = loader.recipe()
    data = replace(deit.data, data_set="IMNET", data_path=str(photos[0].parents[2]), batch_size=2, num_workers=0)
    settings = replace(deit, data=data, augmentation=replace(deit.augmentation, repeated_aug=False))
    dataset, _ = build_dataset(is_train, settings)
    batches = build_loader(dataset, is_train, settings, 0, 1)
    ((batch, _),) = batches
    files = {(0, number): Path(dataset.cropped.samples[index][0]) for index, _, number in batches.sampler}
    measured = loader.load_batch(loader.pipelines(is_train)[loader.OURS], files, np.zeros((len(loader.STAGES), 2)))
    assert torch.equal(batch, measured)


def test_every_stage_is_measured_and_the_table_sums_them(photos: list[Path]) -> None:
    names = list(loader.pipelines(True))
    with ThreadPoolExecutor(1) as here:
        times = loader.measure(True, 2, [photos], dict.fromkeys(names, here))
    assert times.shape == (2, len(names), len(loader.STAGES), 2)
    assert (times[:, :2, 0] == 0).all()  # timm's loaders do not seed each image
    assert (times[:, 2:, 0] > 0).all()
    assert (times[:, :, 1:] > 0).all()

    times = np.ones_like(times)
    times[:, 0] = 3
    rows = {row.pop("per image"): list(row.values()) for row in loader.rows_of(names, times)}
    assert [float(cell) for cell in rows["decode, ms"]] == [3, 1, 1, 1]
    assert rows["all, ms"] == ["18.000 ± 0.000", *["6.000 ± 0.000"] * 3]
    assert [cell.split()[0] for cell in rows["images/s of a core's time"]] == ["56", *["167"] * 3]
    assert [cell.split()[0] for cell in rows["times as fast"]] == ["1.00", *["3.00"] * 3]


def test_a_folder_without_enough_jpegs_is_named(tmp_path: Path, photos: list[Path], monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["loader", "--data-path", str(tmp_path / "val"), "--workers", "3"])
    with pytest.raises(SystemExit):
        loader.main()
    assert f"2 JPEGs in --data-path {tmp_path / 'val'} are too few for --workers 3" in capsys.readouterr().err

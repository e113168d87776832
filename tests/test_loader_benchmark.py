"""The benchmark of the loader compares like with like, and says where it cannot."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import loader
from training.seeding import seed_everything


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    loader.write_photos(tmp_path, 2)
    return sorted(tmp_path.iterdir())


@pytest.mark.parametrize("is_train", [True, False])
def test_the_compared_pipelines_give_the_same_images(photos: list[Path], is_train: bool) -> None:
    for photo in photos:
        images = {}
        for name, pipeline in loader.pipelines(is_train).items():
            seed_everything(0)
            value = photo
            for step in pipeline.values():
                value = step(value)
            images[name] = value
        plain, *exact, ours = images.values()
        assert plain.shape == (3, 224, 224)
        assert all(torch.equal(image, plain) for image in exact)
        assert torch.equal(ours, plain) is not is_train
        assert ((ours - plain).abs() < 0.1).float().mean() > 0.98  # a policy's threshold can turn a rounding into more


def test_every_stage_is_measured_and_the_table_sums_them(photos: list[Path]) -> None:
    times = loader.measure(True, 2, photos)
    names = list(loader.pipelines(True))
    assert times.shape == (2, len(names), len(loader.STAGES), 2)
    assert (times[:, 0, 0] == 0).all()
    assert (times[:, 1:, 0] > 0).all()
    assert (times[:, :, 1:] > 0).all()

    times = np.ones_like(times)
    times[:, 0] = 3
    console = Console(width=110, record=True)
    console.print(loader.table_of("title", names, times))
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1] for line in console.export_text().splitlines() if "│" in line
    }
    assert [float(cell) for cell in rows["decode"]] == [3, 1, 1]
    assert [cell.split() for cell in rows["all"]] == [["18.000", "±", "0.000"], *[["6.000", "±", "0.000"]] * 2]
    assert [cell.split()[0] for cell in rows["images/s of a core's time"]] == ["56", "167", "167"]
    assert [cell.split()[0] for cell in rows["times as fast"]] == ["1.00", "3.00", "3.00"]


def test_a_folder_without_enough_jpegs_is_named(tmp_path: Path, photos: list[Path], monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["loader", "--data-path", str(tmp_path), "--workers", "3"])
    with pytest.raises(SystemExit):
        loader.main()
    assert f"2 JPEGs in --data-path {tmp_path} are too few for --workers 3" in capsys.readouterr().err

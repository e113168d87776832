"""The command line `diagnose.py`: what it measures, writes, leaves out and refuses."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from matplotlib.image import imread

import compare
import diagnose
from datasets import build_dataset
from diagnosis.pictures import write_pictures
from diagnosis.runs import diagnose_runs
from diagnosis.subjects import first_images, open_subject, split
from diagnosis.summary import group
from diagnosis.tables import read_records, report
from lape_vit import plot
from lape_vit.analysis.diagnosis import Diagnosis
from lape_vit.analysis.diagnosis_numbers import Key, numbers
from runtime.logs import LoopDisplay
from tests import tiny_run
from tests.fake_runs import plan_of
from tests.test_model_options import DEIT, OF_SMALL, published  # noqa: F401  (a fixture)
from training.setup import image_settings

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}
MODEL = ("--model-kwargs", *(f"{name}={value}" for name, value in SMALL.items()))


def call(*argv: object) -> int:
    """The exit code of `diagnose.py`."""
    return diagnose.main([*map(str, argv), "--device", "cpu", "--num_workers", "0"])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on standard error, of bad input."""
    assert call(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diagnose.py: error: ")
    return line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two seeds of one training and one of another, diagnosed together, at another size too."""
    folder = tmp_path_factory.mktemp("diagnose")
    images = tiny_run.make_images(folder / "images", num_val=24)
    (folder / "recipe.yaml").write_text(f"{tiny_run.RECIPE}\ndata-path: {images}\n")
    checkpoints = []
    for pe, join_type, seed in (("learnable", "LaPE", 0), ("learnable", "LaPE", 1), ("rope_axial", "basic", 0)):
        out = folder / f"{pe}_{seed}"
        pair = ("--pe", pe, "--join-type", join_type, "--seed", seed, "--epochs", 1, *MODEL)
        assert tiny_run.call("--recipe", folder / "recipe.yaml", "--device", "cpu", *pair, "--output-dir", out) == 0
        checkpoints.append(out / "checkpoint.pth")
    out = folder / "out"
    sizes = ("--sizes", 16, 24, "--size_ways", "plain", "reference-grid", "log-n")
    code = call(*checkpoints, "--output_dir", out, "--images", 20, *sizes)
    return {"code": code, "out": out, "checkpoints": checkpoints, "images": images}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_measure_of_every_checkpoint_is_in_the_record(runs: dict[str, Any]) -> None:
    assert runs["code"] == 0
    records = read_records(runs["out"] / "diagnosis.json")
    assert [record.about["checkpoint"] for record in records] == [str(path) for path in runs["checkpoints"]]
    assert [record.about["seed"] for record in records] == [0, 1, 0]
    for record in records:
        assert (record.fitted, record.held_out, record.grid, record.size) == (10, 10, (4, 4), (16, 16))
        assert (record.judged, record.floor) == (10, 10)
        assert record.accuracy is not None
        assert len(record.layers) == 2
        assert record.untrained
        assert record.seconds > 0
    ways = {record.pe: {(at.way, at.size) for at in record.sizes} for record in records}
    assert ways["learnable"] == {(way, (side, side)) for way in ("plain", "log-n") for side in (16, 24)}
    assert ways["rope_axial"] == ways["learnable"] | {("reference-grid", (side, side)) for side in (16, 24)}
    plain = {at.size: at for at in records[0].sizes if at.way == "plain"}
    assert plain[16, 16].accuracy == records[0].accuracy
    for of_layer, layer in zip(plain[16, 16].entropy, records[0].layers, strict=True):
        assert of_layer == pytest.approx(layer.entropy)
    assert plain[24, 24].grid == (6, 6)


def test_the_tables_hold_the_mean_and_spread_over_seeds(runs: dict[str, Any]) -> None:
    records = read_records(runs["out"] / "diagnosis.json")
    rows = table(runs["out"] / "diagnosis.csv")
    for key in (Key("accuracy"), Key("r2", "read", "permuted", 1), Key("distance", block=0, head=2)):
        one, other = (numbers(record)[key] for record in records[:2])
        (row,) = (
            row
            for row in rows
            if row["label"] == "learnable, LaPE"
            and all(row[name] == ("" if value is None else str(value)) for name, value in key._asdict().items())
        )
        assert float(row["mean"]) == pytest.approx((one + other) / 2)
        assert float(row["std"]) == pytest.approx(abs(one - other) / 2**0.5)
        assert row["seeds"] == "2"
    text = (runs["out"] / "diagnosis.md").read_text()
    for title in ("learnable, LaPE, 2 seeds, block by block", "rope_axial, basic, at other sizes", "Knock-outs"):
        assert title in text


def test_there_is_a_page_for_each_training_and_one_that_compares(runs: dict[str, Any]) -> None:
    pages = sorted(path.name for path in runs["out"].glob("*.png"))
    assert pages == ["diagnosis.png", "layers.png", "learnable_LaPE.png", "rope_axial_basic.png"]
    for page in pages:
        assert min(imread(runs["out"] / page).shape[:2]) > 400


def test_the_page_of_one_record_can_be_drawn_from_a_notebook(runs: dict[str, Any]) -> None:
    record = read_records(runs["out"] / "diagnosis.json")[0]
    figure = plot.diagnosis(replace(record, about={}))  # as lape_vit.analysis.diagnosis.diagnose leaves it
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title[:3] for title in titles] == [f"({letter})" for letter in "abcdefgh"]
    assert all(axes.get_xlabel() for axes in figure.axes)


def test_a_repeated_call_finds_the_same(runs: dict[str, Any], tmp_path: Path) -> None:
    assert call(runs["checkpoints"][0], "--output-dir", tmp_path, "--images", 20, "--batch-size", 3) == 0
    again, before = (read_records(folder / "diagnosis.json")[0] for folder in (tmp_path, runs["out"]))
    for key, value in numbers(again).items():
        if not key.measure.startswith("seconds"):
            assert value == pytest.approx(numbers(before)[key], abs=1e-3)


def test_knock_outs_of_fewer_images_are_told_with_their_number_and_error(runs: dict[str, Any], tmp_path: Path) -> None:
    flags = ("--images", 20, "--knock-out-images", 4, "--sizes", 24)
    assert call(runs["checkpoints"][0], "--output-dir", tmp_path, *flags) == 0
    (record,) = read_records(tmp_path / "diagnosis.json")
    assert (record.fitted, record.held_out, record.judged) == (10, 10, 4)
    assert record.layers[0].removed.agreement in (0, 25, 50, 75, 100)
    text = (tmp_path / "diagnosis.md").read_text()
    assert "10 images to fit probes, 10 to judge, 4 of these for knock-outs and attention" in text
    assert "at most 25.0 points" in text


def test_the_number_of_images_is_told_once_or_of_each_model_where_they_differ(runs: dict[str, Any]) -> None:
    one, _, other = read_records(runs["out"] / "diagnosis.json")
    assert report(group([one, other])).count("Probes are fitted to 10 images") == 1
    text = report(group([one, replace(other, judged=5)]))
    assert "*learnable, LaPE*: Probes are fitted to 10 images" in text
    assert "attention are of 5 of these" in text.partition("*rope_axial, basic*: ")[2]


def test_the_heading_names_every_grid_and_number_of_images(runs: dict[str, Any]) -> None:
    one, _, other = read_records(runs["out"] / "diagnosis.json")
    text = report(group([one, replace(other, grid=(3, 5), fitted=12)])).splitlines()[0]
    assert "4 x 4 and 3 x 5 patches" in text
    assert "10 images to fit probes, 10 to judge and 12 images to fit probes, 10 to judge" in text


def test_pictures_are_drawn_once_and_also_where_a_later_checkpoint_is_no_good(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"damaged")
    drawn: list[int] = []

    def draw(folder: Path, records: list[Diagnosis]) -> None:
        assert len(read_records(folder / "diagnosis.json")) == len(records)  # the tables are there before
        drawn.append(len(records))
        write_pictures(folder, records)

    monkeypatch.setattr("diagnose.write_pictures", draw)
    checkpoints = (*runs["checkpoints"][:2], tmp_path / "damaged.pth")
    line = refused(capsys, *checkpoints, "--output_dir", tmp_path / "out", "--images", 8)
    assert "damaged.pth" in line
    assert drawn == [2]
    assert (tmp_path / "out" / "learnable_LaPE.png").exists()


def test_checkpoints_without_different_seeds_stand_for_themselves(runs: dict[str, Any]) -> None:
    one, other, third = read_records(runs["out"] / "diagnosis.json")
    assert [len(each.records) for each in group([one, other, third])] == [2, 1]
    labels = [each.label for each in group([one, Diagnosis.of({**one.as_dict(), "about": other.about | {"seed": 0}})])]
    assert labels == ["learnable, LaPE: learnable_0", "learnable, LaPE: learnable_1"]
    of_notebook = replace(one, about={})
    assert [each.label for each in group([of_notebook] * 2)] == ["learnable, LaPE: 0", "learnable, LaPE: 1"]


def test_other_classes_cost_the_accuracy_and_nothing_else(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tiny_run.make_images(tmp_path / "images", classes=("cat", "dog"))
    assert call(runs["checkpoints"][0], "--data-path", images, "--output-dir", tmp_path / "out") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "accuracies are left out" in line)
    assert "circle" in line
    (record,) = read_records(tmp_path / "out" / "diagnosis.json")
    assert record.accuracy is None
    assert record.knock_outs["places permuted"].accuracy is None
    assert record.layers[0].read.permuted.r2 > 0.4
    assert "accuracy (%)" not in (tmp_path / "out" / "diagnosis.md").read_text().partition("## Knock-outs")[2]


def test_weights_of_timm_in_a_file_are_taken_with_the_name_of_their_model(runs: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, **SMALL)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model = ("--model", "vit_tiny_patch16_224", "--input-size", 32, *MODEL)
    data = ("--data-set", "FOLDER", "--data-path", runs["images"])
    assert call(tmp_path / "theirs.pth", *model, *data, "--output_dir", tmp_path / "out", "--images", 8) == 0
    (record,) = read_records(tmp_path / "out" / "diagnosis.json")
    assert (record.pe, record.join_type, record.accuracy, record.grid) == ("learnable", "basic", None, (2, 2))
    assert record.about["seed"] is None


def test_weights_that_timm_publishes_are_taken_by_name(
    runs: dict[str, Any],
    published: dict[str, torch.Tensor],  # noqa: F811
    tmp_path: Path,
) -> None:
    model = ("--model", DEIT, "--pretrained", "--pe", "learnable", *OF_SMALL)
    data = ("--data-set", "FOLDER", "--data-path", runs["images"], "--images", 8)
    assert call(*model, *data, "--output_dir", tmp_path) == 0
    (record,) = read_records(tmp_path / "diagnosis.json")
    assert record.about["checkpoint"] == f"{DEIT}.fb_in1k"
    assert record.accuracy is None
    assert record.input_taken_away is not None


def test_the_two_halves_share_no_image_and_are_the_same_at_every_call(runs: dict[str, Any]) -> None:
    setup = tiny_run.set_up("--eval", "--resume", runs["checkpoints"][0], "--device", "cpu")
    images, _ = build_dataset(False, image_settings(setup.options, setup.description))
    halves = [[half.pictures.indices for half in split(images, 20)] for _ in range(2)]  # type: ignore[attr-defined]
    assert halves[0] == halves[1]
    fitted, held_out = halves[0]
    assert (len(fitted), len(held_out)) == (10, 10)
    assert not {*fitted} & {*held_out}
    assert sum(map(len, (half.pictures.indices for half in split(images, 999)))) == 24  # type: ignore[attr-defined]


def test_the_first_images_of_batches_end_within_a_batch() -> None:
    batches = [
        (torch.arange(3), torch.arange(3)),
        (torch.arange(3, 6), torch.arange(3)),
        (torch.arange(9), torch.arange(9)),
    ]
    found = [images.tolist() for images, _ in first_images(batches, 4)]
    assert found == [[0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), ["--output_dir"]),
        (("--output_dir", "OUT"), ["give checkpoints", "--model NAME --pretrained"]),
        (("missing.pth", "--output_dir", "OUT"), ["missing.pth"]),
        (("RUN", "--output_dir", "OUT", "--pretrained"), ["--pretrained and", "give one of them"]),
        (("RUN", "RUN", "--output_dir", "OUT"), ["names one thing twice"]),
        (("RUN", "--output_dir", "OUT", "--size-ways", "log-n"), ["--sizes", "give both"]),
        (("RUN", "--output_dir", "OUT", "--sizes", "17"), ["--sizes 17", "4 pixels"]),
        (("RUN", "--output_dir", "OUT", "--images", "3"), ["--images"]),
        (("RUN", "--output_dir", "OUT", "--lr", "1"), ["unknown option --lr"]),
        (("RUN", "--output_dir", "OUT", "--imagse", "8"), ["did you mean --images"]),
        (("RUN", "--output_dir", "OUT", "--pe", "none"), ["--pe none contradicts"]),
        (("--model", "vit_compact_patch4_32", "--pretrained", "--output_dir", "OUT"), ["publishes no such weights"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], words: list[str]
) -> None:
    named = {"RUN": runs["checkpoints"][0], "OUT": tmp_path / "out"}
    line = refused(capsys, *(named.get(word, word) for word in argv))
    assert all(word in line for word in words), line


def test_a_result_that_cannot_be_written_is_told_with_exit_code_1(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "diagnosis.md").mkdir()
    assert call(runs["checkpoints"][0], "--output_dir", tmp_path, "--images", 8) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diagnose.py: error: ")
    assert "diagnosis.md" in line


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    for text in ("{", json.dumps([{"pe": "none"}]), json.dumps({"a": 1})):
        (tmp_path / "diagnosis.json").write_text(text)
        with pytest.raises(ValueError, match="is no diagnosis"):
            read_records(tmp_path / "diagnosis.json")


def test_compare_diagnoses_its_runs_over_their_seeds(
    runs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"{tiny_run.RECIPE}\ndata-path: {runs['images']}\n")
    flags = ("--recipe", tmp_path / "recipe.yaml", "--device", "cpu", "--epochs", 1, *MODEL)
    argv = [*map(str, ("--pe", "none", "--seeds", 0, 1, 2, *flags, "--output_dir", tmp_path / "out"))]
    plan = plan_of(*argv)
    for run in plan.runs:
        assert tiny_run.call(*run.argv, "--output-dir", run.folder) == 0
    plan.runs[2].best_checkpoint.write_bytes(b"damaged")
    assert compare.main([*argv, "--diagnose"]) == 1
    assert "the diagnosis of none, basic, seed 2 failed" in capsys.readouterr().err
    records = read_records(tmp_path / "out" / "diagnosis" / "diagnosis.json")
    assert [record.about["seed"] for record in records] == [0, 1]
    text = (tmp_path / "out" / "diagnosis" / "diagnosis.md").read_text()
    assert "none, basic, 2 seeds" in text
    assert (tmp_path / "out" / "diagnosis" / "none_basic.png").exists()

    opened = []
    monkeypatch.setattr("diagnosis.runs.open_subject", lambda *args: opened.append(args[1]) or open_subject(*args))
    checkpoints = [str(run.best_checkpoint) for run in plan.runs]
    for sizes, expected in (([], checkpoints[2:]), ([16], checkpoints), ([16], checkpoints[2:])):
        opened.clear()
        _, failures = diagnose_runs(plan, sizes, ["plain"], LoopDisplay(None))
        assert opened == expected  # only a new size is measured; the rest is known
        assert [*failures] == ["the diagnosis of none, basic, seed 2"]

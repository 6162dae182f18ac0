"""The bank verbs: what they print and the code they leave with."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from streamaug.bank import LatentBank
from streamaug.cli import app
from streamaug.data import ImageSet
from streamaug.data.perceptual import perceptual_hash

from .banks import CLASSES, contents, make_plan, plan_of, shard_of, write


def run(*arguments: object, code: int = 0) -> str:
    # Wide enough that no line is broken, however long the folder's name is.
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["bank", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_info_shows_rows_classes_methods_tensors_quality_and_size(expected):
    shown = run("info", expected[2].path)
    assert "23 rows" in shown and "kB in 10 files" in shown
    for text in (
        *CLASSES,
        "encode",
        "groups of 5 rows",
        "lr 0.1",
        "tokens bfloat16 [2, 4]",
        "embedding.loss",
        "median",
    ):
        assert text in shown
    assert expected[2].digest in shown


def test_info_as_json_is_what_a_program_needs(expected):
    bank = expected[2]
    found = json.loads(run("info", bank.path, "--json"))
    assert found["rows"] == 23 and found["classes"] == {"cat": 8, "dog": 8, "emu": 7} and found["digest"] == bank.digest
    assert found["bytes"] == sum(len(data) for name, data in expected[1].items() if name.endswith("safetensors"))
    assert [part["name"] for part in found["parts"]] == ["encode", "embedding"]
    assert found["parts"][1]["tensors"]["tokens"] == {"dtype": "bfloat16", "shape": [2, 4]}
    scores = bank.row_array("encode.score")
    assert found["row_arrays"]["encode.score"]["median"] == pytest.approx(float(np.median(scores)))


def test_info_of_a_bank_without_inversion(tmp_path):
    write(tmp_path / "bank", make_plan(rows=0, parts=[]))
    assert "0 rows" in run("info", tmp_path / "bank")


def test_a_bank_without_rows_has_none_to_drop(tmp_path):
    write(tmp_path / "bank", make_plan(rows=0, parts=[]))
    (tmp_path / "list").write_text("digits/1")
    assert "no rows to drop" in run("drop", tmp_path / "bank", "--in-place", "--hashes", tmp_path / "list", code=2)


def test_the_figures_of_info_fit_a_terminal_of_80_columns(expected, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "…" not in run("info", expected[2].path)


def test_verify_passes_a_sound_bank_and_fails_a_damaged_one(copy):
    assert "every checksum fits" in run("verify", copy)
    os.truncate(shard_of(copy, 1), 200)
    said = run("verify", copy, code=1)
    assert "encode-00001" in said and "200 bytes of" in said and "--repair" in said


def test_verify_repair_lists_what_it_drops_and_the_bank_opens_again(copy):
    os.truncate(shard_of(copy, 3), 200)
    assert "verify" in run("info", copy, code=2)  # it does not open, and says what helps
    said = run("verify", copy, "--repair")
    assert "Dropped 5 of 23 rows:" in said and "row 18: images/18.png" in said
    assert "every checksum fits" in run("verify", copy)


def test_verify_against_fails_when_a_validation_image_was_inverted(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 4, 4), dtype=np.uint8)
    hashes = ImageSet.from_arrays(images[:3], [0, 1, 2], CLASSES).hashes
    plan = plan_of(["0", "1", "2"], source_hashes=hashes, perceptual_hashes=perceptual_hash(images[:3]))
    write(tmp_path / "bank", plan)
    folder = tmp_path / "validation" / "cat"
    folder.mkdir(parents=True)
    assert "nothing was compared" in run("verify", tmp_path / "bank", "--against", folder, code=2)
    Image.fromarray(images[3, 0]).save(folder / "new.png")
    assert "None of 1 images" in run("verify", tmp_path / "bank", "--against", folder.parent)
    Image.fromarray(images[1, 0]).save(folder / "old.png")
    said = run("verify", tmp_path / "bank", "--against", folder.parent, code=1)
    assert "old.png was inverted: row 1, images/1.png (the same pixels)" in said
    assert "1 of 2 images" in said


def test_drop_says_how_many_rows_of_each_class_and_needs_to_know_where(copy, tmp_path):
    before = contents(copy)
    assert "either --out FOLDER" in run("drop", copy, "--class", "dog", code=2)
    assert "either --out FOLDER" in run("drop", copy, "--class", "dog", "--out", tmp_path / "a", "--in-place", code=2)
    assert "did you mean 'dog'" in run("drop", copy, "--class", "dogs", "--in-place", code=2)
    assert contents(copy) == before
    said = run("drop", copy, "--class", "dog", "--class", "emu", "--out", tmp_path / "cats")
    assert "dog: 8 rows dropped" in said and "emu: 7 rows dropped" in said and "8 rows left, 15 dropped" in said
    (tmp_path / "list.txt").write_text("images/0.png\nimages/nowhere.png\n")
    said = run("drop", copy, "--hashes", tmp_path / "list.txt", "--quality", "embedding.loss>1e9", "--in-place")
    assert "1 lines of" in said and "22 rows left, 1 dropped" in said
    assert LatentBank.open(copy).num_rows == 22


def test_merge_counts_duplicates_and_refuses_another_model(expected, copy, tmp_path):
    said = run("merge", expected[2].path, copy, "--out", tmp_path / "both")
    assert "23 rows; 23 duplicates left out" in said
    write(tmp_path / "other", make_plan(meta={"model": "m2", "image_shape": [1, 4, 4]}))
    said = run("merge", copy, tmp_path / "other", "--out", tmp_path / "c", code=2)
    assert "meta.model is 'm2' there and 'm1' here" in said


@pytest.mark.parametrize("verb", ["info", "verify", "merge", "drop"])
def test_each_verb_shows_an_example(verb):
    assert f"streamaug bank {verb} " in run(verb, "--help")


def test_a_folder_that_is_no_bank_is_one_message(tmp_path):
    for verb in (["info"], ["verify"], ["drop", "--class", "a", "--in-place"]):
        assert "not a latent bank" in run(verb[0], tmp_path, *verb[1:], code=2)
    assert list(tmp_path.iterdir()) == []


def test_options_that_belong_to_against_are_refused_without_it(expected):
    assert "--against" in run("verify", expected[2].path, "--distance", 3, code=2)
    assert "crop, letterbox" in run("verify", expected[2].path, "--against", "x", "--fit", "squeeze", code=2)


def test_markup_in_names_is_printed_as_it_is(copy, tmp_path):
    path = shutil.move(copy, tmp_path / "[red]bank")
    assert "[red]bank" in run("info", path).replace("\n", "")

"""Replay: images of a run made again are the delivered ones, bit for bit, or are refused with the reason."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from streamaug import replay as replaying
from streamaug.bank import LatentBank
from streamaug.bank.edit import drop
from streamaug.cli import app
from streamaug.config import DataConfig, StreamConfig, load
from streamaug.data import load_splits
from streamaug.errors import MismatchError, StreamaugError, UsageError
from streamaug.preparation import prepare
from streamaug.progress import Silent
from streamaug.replay import Replayer, export, relocated, replay, require_same_files
from streamaug.stream import Stream, hashing
from streamaug.stream.manifest import Manifest
from streamaug.stream.rehearsal import make_planner, make_stream

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prepared(small_overrides, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.manifest"
    return prepare(
        load("digits", [*small_overrides, f"stream.manifest={path}", "judge.floor=0.1", "judge.confident=0.9"])
    )


@pytest.fixture(scope="module")
def manifest(prepared) -> Path:
    return prepared.config.stream.manifest


@pytest.fixture(scope="module")
def delivered(prepared, manifest) -> dict[int, tuple[int, bytes]]:
    """A run with feedback and a live judge, interrupted, resumed with another backend: id -> (label, pixels)."""
    found = {}

    def step(stream: Stream, number: int) -> None:
        batch = stream.take(11)
        for at in range(len(batch)):
            found[int(batch.ids[at])] = int(batch.labels[at]), batch.images[at].tobytes()
        stream.feedback(batch.labels, 0.5 + batch.labels * (number % 3))
        if number % 3 == 1:
            state = prepared.judge_state.view(np.float32) * (1 - 0.02 * number)
            stream.publish_judge(state.astype(np.float32).view(np.uint8))

    with Stream.from_prepared(prepared) as stream:
        for number in range(6):
            step(stream, number)
        state = stream.state_dict()
    local = prepared.config.stream.model_copy(update={"backend": "local"})
    with Stream.from_prepared(replace(prepared, config=prepared.config.model_copy(update={"stream": local}))) as stream:
        stream.load_state_dict(state)
        for number in range(6, 11):
            step(stream, number)
    assert len(found) == 121
    return found


def pixels_in(path: Path) -> bytes:
    return np.asarray(Image.open(path)).tobytes()


def test_every_delivered_image_comes_out_again_bit_for_bit_and_rejected_ones_stay_out(delivered, manifest):
    with Manifest(manifest) as found, Replayer(found) as replayer:
        again, judges = {}, set()
        for batch in found.batches.values():
            judges.add(batch.judge)
            for image in replayer.make(batch)[: batch.delivered]:
                again[image.id] = image.label, image.pixels.tobytes()
    assert again == delivered
    assert list(again) == list(delivered), "in the order of delivery"
    assert len(judges) > 2
    assert max(delivered) >= len(delivered) + 5, "some were rejected"


def test_a_resumed_run_went_on_with_the_same_file(delivered, manifest):
    with Manifest(manifest) as found:
        backends = [run["engine_options"]["config"]["stream"]["backend"] for run in found.runs]
        assert backends == ["process", "local"]
        assert sum(batch.delivered for batch in found.batches.values()) == len(delivered)


def test_the_command_writes_single_images_and_says_why_others_are_not(delivered, manifest, prepared, tmp_path):
    low, high = min(delivered), max(delivered)
    missing = next(number for number in range(low, high) if number not in delivered)
    arguments = ["replay", str(manifest), "--ids", f"{low},{high}", str(missing), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = {f"{number}-{prepared.class_names[delivered[number][0]]}.png": number for number in (low, high)}
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    for name, number in names.items():
        assert pixels_in(tmp_path / name) == delivered[number][1]
        assert str(tmp_path / name) in result.stdout
    assert f"{missing}: rejected (" in result.stderr
    result = CliRunner().invoke(app, ["replay", str(manifest), "--ids", str(missing), "--rejected", *arguments[-2:]])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob(f"{missing}-*.png")
    assert path.stem.rpartition("-")[2] in ("unlikely_label", "confidently_wrong", "no_contrast")


def test_an_export_of_folders_holds_the_whole_set_and_goes_on_where_it_stopped(
    delivered, manifest, prepared, tmp_path, monkeypatch
):
    made = Replayer.make
    calls = []

    def stops(self, batch, **options):
        calls.append(batch.k)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(self, batch, **options)

    monkeypatch.setattr(Replayer, "make", stops)
    with pytest.raises(KeyboardInterrupt):
        export(manifest, tmp_path, "png", progress=Silent())
    assert export(manifest, tmp_path, "png", progress=Silent()) == len(delivered)
    assert calls.count(calls[0]) == calls.count(calls[1]) == 1 and calls.count(calls[2]) == 2
    files = {int(path.stem): path for path in tmp_path.glob("*/*.png")}
    assert set(files) == set(delivered)
    for number, path in files.items():
        label, pixels = delivered[number]
        assert path.parent.name == prepared.class_names[label]
        assert pixels_in(path) == pixels


def test_an_export_of_shards_holds_image_class_and_order(delivered, manifest, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(replaying, "_SHARD_IMAGES", 64)
    assert export(manifest, tmp_path, "webdataset", progress=Silent()) == len(delivered)
    shards = sorted(tmp_path.glob("*.tar"))
    assert len(shards) > 1
    found = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(int(key), {})[extension] = tar.extractfile(member).read()
    assert list(found) == list(delivered)
    for number, sample in found.items():
        label, pixels = delivered[number]
        (tmp_path / "one.png").write_bytes(sample["png"])
        assert pixels_in(tmp_path / "one.png") == pixels
        assert int(sample["cls"]) == label
        about = json.loads(sample["json"])
        assert (about["id"], about["label"], about["class"]) == (number, label, prepared.class_names[label])
    before = [shard.stat().st_mtime_ns for shard in shards]
    export(manifest, tmp_path, "webdataset", progress=Silent())
    assert [shard.stat().st_mtime_ns for shard in shards] == before


@pytest.mark.parametrize(("form", "source"), [("png", "folder"), ("webdataset", "webdataset")])
def test_an_export_is_a_data_set_that_can_be_trained_on(delivered, manifest, prepared, tmp_path, form, source):
    export(manifest, tmp_path, form, progress=Silent())
    names = prepared.class_names
    config = DataConfig(
        source=source, root=tmp_path, class_names=names, image_size=8, channels=1, holdout=0, validation=0
    )
    found = load_splits(config).train
    ids = [int(Path(name).stem) for name in found.sources]
    assert sorted(ids) == sorted(delivered)
    for number, label, pixels in zip(ids, found.labels.tolist(), found.images, strict=True):
        assert (names.index(found.class_names[label]), pixels.tobytes()) == delivered[number]


def test_a_range_of_ids_is_exported_alone(delivered, manifest, tmp_path):
    result = CliRunner().invoke(app, ["replay", str(manifest), "--export", str(tmp_path), "--range", "20:50"])
    inside = {number for number in delivered if 20 <= number < 50}
    assert f"({len(inside)} delivered images)" in result.output
    assert {int(path.stem) for path in tmp_path.glob("*/*.png")} == inside


# Refusals.


def test_an_id_that_was_never_ordered_is_refused_with_the_range(delivered, manifest, tmp_path):
    with pytest.raises(UsageError, match=r"--ids 999999: .* has ids from 0 to \d+ \(\d+ batches of 16\)"):
        replay(manifest, [3, 999999], tmp_path, progress=Silent())
    with pytest.raises(UsageError, match=r"--range 900000:900001: none of its images"):
        export(manifest, tmp_path, "png", ids=(900000, 900001), progress=Silent())


@pytest.mark.parametrize("name", ["streamaug", "torch", "diffusers", "device"])
def test_other_versions_are_refused_with_both(delivered, manifest, tmp_path, monkeypatch, name):
    here = replaying.versions("cpu")
    monkeypatch.setattr(replaying, "versions", lambda device: here | {name: "9.9"})
    was = re.escape(here[name])
    with pytest.raises(MismatchError, match=rf"{name} was {was} and is 9.9 now.*--any-version"):
        replay(manifest, [min(delivered)], tmp_path, progress=Silent())
    assert not list(tmp_path.iterdir())


def test_other_versions_can_be_allowed(delivered, manifest, tmp_path, monkeypatch, caplog):
    here = replaying.versions("cpu")
    monkeypatch.setattr(replaying, "versions", lambda device: here | {"torch": "9.9"})
    some = min(delivered)
    (path,) = replay(manifest, [some], tmp_path, any_version=True, progress=Silent()).paths
    assert pixels_in(path) == delivered[some][1]
    assert "9.9" in caplog.text


def test_another_model_is_refused_and_a_moved_one_is_found(delivered, manifest, prepared, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(prepared.model.path, moved)
    shutil.copytree(prepared.model.path, other)
    weights = next(other.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    some = max(delivered)
    with pytest.raises(MismatchError, match=rf"the model in .* is \w+, the run's was {prepared.model.digest}"):
        replay(manifest, [some], tmp_path, overrides=[f"model.path={other}"], progress=Silent())
    (path,) = replay(manifest, [some], tmp_path, overrides=[f"model.path={moved}"], progress=Silent()).paths
    assert pixels_in(path) == delivered[some][1]


def test_another_bank_is_refused_and_a_missing_one_named(prepared, tmp_path):
    options, extra = prepared.engine_options, prepared.plan_extra
    drop(prepared.bank.path, tmp_path / "fewer", classes=prepared.class_names[:1])
    fewer = LatentBank.open(tmp_path / "fewer")
    with pytest.raises(MismatchError, match=rf"the bank in .* is {fewer.digest}, the run's was {prepared.bank.digest}"):
        require_same_files(relocated(options, {"bank.path": str(fewer.path)}), extra)
    with pytest.raises(UsageError, match=r"none: not there any more; say where .* --set bank.path=FOLDER"):
        require_same_files(relocated(options, {"bank.path": str(tmp_path / "none")}), extra)


def test_other_encoded_prompts_are_refused(prepared, tmp_path):
    other = tmp_path / "feedbeef.safetensors"
    other.touch()
    extra = prepared.plan_extra | {"prompts": "c0ffee"}
    with pytest.raises(
        MismatchError, match=r"the encoded prompts in .* is feedbeef, the run's was c0ffee; --set cache="
    ):
        require_same_files(prepared.engine_options | {"prompts": str(other)}, extra)


@pytest.mark.parametrize("setting", ["seed=3", "model.steps=5", "recipes=[{kind: prompt}]", "stream.batch_size=8"])
def test_another_plan_is_refused_it_is_the_manifests(delivered, manifest, tmp_path, setting):
    with pytest.raises(UsageError, match=rf"--set {re.escape(setting)}: a replay takes its settings from the manifest"):
        replay(manifest, [min(delivered)], tmp_path, overrides=[setting], progress=Silent())


def test_all_that_was_in_the_cache_moves_with_it(prepared, tmp_path):
    os.symlink(prepared.config.cache, tmp_path / "cache")
    options = relocated(prepared.engine_options, {"cache": str(tmp_path / "cache")})
    assert Path(options["model"]).is_relative_to(tmp_path / "cache") and Path(options["bank"]).parent.name == "cache"
    require_same_files(options, prepared.plan_extra)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --ids with the images to make again, or --export"),
        (["--ids", "1", "--export", "OUT"], "give either"),
        (["--export", __file__], "a file, expected a folder; choose another --export"),
        (["--ids", "1,two"], "--ids two: an id is a whole number"),
        (["--export", "OUT", "--format", "jpg"], "--format jpg: accepted are png and webdataset"),
        (["--export", "OUT", "--rejected"], "--rejected is for --ids"),
        (["--export", "OUT", "--range", "9"], "--range 9: expected two ids"),
        (["--ids", "1", "--range", "1:2"], "--range is for --export"),
        (["--ids", "1", "--set", "seed=3"], "--set seed=3: a replay takes its settings from the manifest"),
        (["--ids", "1", "--set", "model.path"], "--set model.path: expected key=value"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(delivered, manifest, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tmp_path / "out") if each == "OUT" else each for each in arguments]
    result = CliRunner().invoke(app, ["replay", str(manifest), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


# Engines that are not ours.


@pytest.mark.parametrize(("form", "files"), [("png", "*/*.png"), ("webdataset", "*.tar")])
def test_a_disk_that_is_full_stops_an_export_with_a_message_and_it_goes_on_where_it_stopped(
    tmp_path, monkeypatch, form, files
):
    monkeypatch.setattr(replaying, "_SHARD_IMAGES", 16)
    path, out = tmp_path / "run.manifest", tmp_path / "out"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(64)
    export(path, out, form, ids=(0, 16), progress=Silent())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StreamaugError, match=r"cannot be written: File too large; make room there and run"):
            export(path, out, form, progress=Silent())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.rglob(".*.part"))
    export(path, out, form, progress=Silent())
    whole = tmp_path / "whole"
    export(path, whole, form, progress=Silent())
    written = {each.relative_to(whole): each.read_bytes() for each in whole.glob(files)}
    assert len(written) >= 4 and all((out / name).read_bytes() == data for name, data in written.items())


def test_images_in_colour_are_written_pixel_for_pixel_and_as_data_sets_are_read(tmp_path):
    path, given = tmp_path / "run.manifest", {}
    config = StreamConfig.model_validate({"batch_size": 8, "in_flight": 2, "backend": "local", "manifest": path})
    options = {"image_shape": [3, 5, 7], "reject": 0.3}
    with Stream(
        make_planner(8),
        engine="streamaug.stream.hashing:build",
        engine_options=options,
        image_shape=(3, 5, 7),
        config=config,
    ) as stream:
        batch = stream.take(40)
    for number, label, image in zip(batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True):
        given[number] = label, image.transpose(1, 2, 0).tobytes()
    export(path, tmp_path / "png", "png", progress=Silent())
    found = {int(each.stem): (int(each.parent.name), pixels_in(each)) for each in tmp_path.glob("png/*/*.png")}
    assert found == given
    export(path, tmp_path / "tar", "webdataset", progress=Silent())
    found = {}
    with tarfile.open(tmp_path / "tar/images-00000.tar") as tar:
        for picture, number, _ in zip(*[iter(tar)] * 3, strict=True):
            shown = Image.open(tar.extractfile(picture))
            found[int(picture.name.removesuffix(".png"))] = int(tar.extractfile(number).read()), shown.tobytes()
    assert found == given


def test_a_batch_that_comes_out_otherwise_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "run.manifest"
    with make_stream(manifest=path, backend="local") as stream:
        stream.take(8)
    pixels_of = hashing.pixels_of
    monkeypatch.setattr(hashing, "pixels_of", lambda digest, shape: pixels_of(digest, shape) ^ 1)
    with pytest.raises(MismatchError, match="batch 0 does not come out as it was delivered"):
        replay(path, [0], tmp_path, progress=Silent())
    assert replay(path, [0], tmp_path, any_version=True, progress=Silent()).paths


KILLED = """
import os, signal, sys
import numpy as np
from streamaug.stream.rehearsal import make_planner, make_stream
with make_stream(manifest=sys.argv[1], judge=np.zeros(16, np.uint8), engine_options={"reject": 0.3}) as stream:
    for step in range(8):
        batch = stream.take(5)
        for at in range(5):
            print(batch.ids[at], batch.images[at].tobytes().hex(), flush=True)
        stream.publish_judge(np.full(16, step, np.uint8))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_all_that_a_killed_trainer_was_given_can_be_made_again(tmp_path):
    path = tmp_path / "run.manifest"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, cwd=ROOT)
    given = dict(line.split() for line in done.stdout.splitlines())
    assert done.returncode == -9 and len(given) == 40, done.stderr
    replayed = replay(path, map(int, given), tmp_path, progress=Silent())
    assert {each.stem.partition("-")[0]: pixels_in(each).hex() for each in replayed.paths} == given
    assert replayed.left_out == []


@pytest.mark.parametrize("form", ["png", "webdataset"])
def test_an_export_of_a_run_that_went_back_follows_it(tmp_path, form, monkeypatch):
    monkeypatch.setattr(replaying, "_SHARD_IMAGES", 16)
    path, out = tmp_path / "run.manifest", tmp_path / "out"
    options = {"manifest": path, "backend": "local", "engine_options": {"reject": 0.3}, "judge": np.zeros(4, np.uint8)}
    with make_stream(**options) as stream:
        first = stream.take(4).ids.tolist()
        state = stream.state_dict()
        stream.publish_judge(np.ones(4, np.uint8))
        stream.take(90)
    export(path, out, form, progress=Silent())
    with make_stream(**options) as stream:
        stream.load_state_dict(state)
        stream.publish_judge(np.full(4, 2, np.uint8))
        again = stream.take(60).ids.tolist()
    export(path, out, form, progress=Silent())
    files = [each.name for each in out.glob("*/*.png")]
    for shard in out.glob("*.tar"):
        with tarfile.open(shard) as tar:
            files += [name for name in tar.getnames() if name.endswith("png")]
    assert sorted(int(name.removesuffix(".png")) for name in files) == sorted(first + again)


def test_class_names_that_are_no_file_names_become_some():
    names = replaying._file_names(["a/b", "a:b", "..", "A_b", "café 1"])
    assert names == ["a_b", "a_b-1", "class", "A_b-3", "café 1"]


def test_train_records_where_it_is_told_to(monkeypatch, tmp_path):
    seen = []

    def train_run(config, **options):
        seen.append(config.stream.manifest)
        return {"accuracy": 0.5}

    monkeypatch.setattr("streamaug.experiment.train_run", train_run)
    path = tmp_path / "a: b.manifest"
    arguments = ["train", "digits", "--out", str(tmp_path), "--manifest", str(path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [path]

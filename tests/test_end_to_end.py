"""The whole chain in real processes: kill -9 changes nothing, the demo reports the truth, nothing stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import segments
from PIL import Image

pytestmark = pytest.mark.timeout(600)  # each waits for processes that import torch and train

DEMO_KEYS = {
    *(
        "real_only",
        "stream",
        "gain_mean",
        "gain_ci95",
        "images_generated",
        "images_delivered",
        "images_per_second",
    ),
    *(
        "fresh_share",
        "mean_reuse",
        "acceptance",
        "stall_seconds",
        "time_to_first_batch_seconds",
        "seconds_total",
    ),
    *("versions", "command", "config"),
}


def command(*arguments, overrides=()):
    sets = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "streamaug", *map(str, arguments), *sets]


def run(*arguments, overrides=(), cwd=None, **options):
    done = subprocess.run(
        command(*arguments, overrides=overrides),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


def producers_of(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        try:
            command = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if b"streamaug.stream.producer" in command:
            found.append(child)
        elif b"streamaug.stream.producers.forkserver" in command:
            found += children_of(child)  # its copies
    return found


def children_of(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):  # a child belongs to the thread that started it
        with suppress(OSError):
            found += [int(child) for child in thread.read_text().split()]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # also while it is read
        return False


def gone(pids, seconds=30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def undisturbed(small_overrides, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    code, _, errors = run("train", "digits", "--out", out, overrides=[*small_overrides, "train.steps=40"])
    assert code == 0, errors
    return json.loads((out / "report.json").read_text())


def test_train_reports_what_it_did(undisturbed):
    assert undisturbed["delivered"] == 40 * 8
    assert undisturbed["fresh_share"] == 1.0
    assert undisturbed["restarts"] == 0
    assert 0 < undisturbed["accuracy"] <= 1
    assert undisturbed["stream"]["curve"][-1][0] == 40


def train_killing_producers(out: Path, overrides: list[str]) -> dict:
    """The report of a training whose producer is killed while it starts, and another while it works."""
    trainer = subprocess.Popen(
        command("train", "digits", "--out", out, overrides=overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    killed = []
    while trainer.poll() is None and len(killed) < 2:
        for pid in producers_of(trainer.pid):
            if pid not in killed:
                time.sleep(0.3 + 0.3 * len(killed))  # the first while it starts, the second while it works
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
        time.sleep(0.02)
    output, _ = trainer.communicate(timeout=300)
    assert trainer.returncode == 0, output
    return json.loads((out / "report.json").read_text())


def test_killing_the_producer_changes_nothing_in_the_result(undisturbed, small_overrides, tmp_path):
    for attempt in range(3):  # a kill that is held up for long comes when all is trained
        report = train_killing_producers(tmp_path / str(attempt), [*small_overrides, "train.steps=40"])
        assert report["accuracy"] == undisturbed["accuracy"]
        assert report["stream"]["curve"] == undisturbed["stream"]["curve"]
        assert report["delivered"] == undisturbed["delivered"]
        assert report["accepted"] >= report["delivered"]
        if report["restarts"]:
            break
    assert report["restarts"] >= 1


def test_ctrl_c_in_training_leaves_nothing_behind(small_overrides, tmp_path):
    shared = segments.names()
    trainer = subprocess.Popen(
        command("train", "digits", "--out", tmp_path, overrides=[*small_overrides, "train.steps=100000"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not (pids := producers_of(trainer.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(6)
    trainer.send_signal(signal.SIGINT)
    output, _ = trainer.communicate(timeout=120)
    assert trainer.returncode == 130, output
    assert "Traceback" not in output
    assert pids
    assert gone(pids)
    assert not segments.left_behind(shared)


@pytest.fixture(scope="module")
def demo_out(small_overrides, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    overrides = [override for override in small_overrides if not override.startswith("train.steps")]
    code, output, errors = run(
        "demo", "digits", "--seeds", 2, "--seed", 3, "--out", out, overrides=[*overrides, "train.steps=20"]
    )
    assert code == 0, errors
    return out, output


def test_the_demo_delivers_exactly_its_share_all_of_it_fresh(demo_out):
    out, _ = demo_out
    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= DEMO_KEYS
    assert report["images_delivered"] == 0.5 * 16 * 20 * 2
    assert report["images_generated"] >= report["images_delivered"]
    assert report["fresh_share"] == 1.0
    assert report["seeds"] == [3, 4]
    for arm in ("real_only", "stream"):
        assert report[arm]["steps"] == 20
        assert len(report[arm]["accuracies"]) == 2
        assert all(0 <= value <= 1 for value in report[arm]["accuracies"])
    gains = np.subtract(report["stream"]["accuracies"], report["real_only"]["accuracies"])
    assert report["gain_mean"] == pytest.approx(gains.mean())
    assert report["gain_ci95"][0] <= report["gain_mean"] <= report["gain_ci95"][1]


def test_the_demo_says_first_what_came_of_it(demo_out):
    out, output = demo_out
    report = json.loads((out / "report.json").read_text())
    assert output.splitlines()[0] == report["verdict"]
    if report["gain_mean"] <= 0:
        assert re.match(r"No gain|Worse", report["verdict"])
    for picture in ("samples.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors(256)) > 20
    assert "http" not in re.sub(r"<a [^>]*>", "", (out / "report.html").read_text("utf-8")).replace("http-equiv", "")


def test_a_folder_of_pngs_trains_and_previews(tmp_path, cache):
    rng = np.random.default_rng(0)
    for name, axis in (("rows", 0), ("columns", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 80, (20, 20, 3))
            pixels[(slice(None, None, 2),) if axis == 0 else (slice(None), slice(None, None, 2))] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "rows" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    overrides = [
        f"data.root={tmp_path / 'images'}",
        f"cache={cache}",
        "data.image_size=16",
        *("prior.channels=[8, 16]", "prior.steps=10", "prior.batch_size=8", "model.steps=3"),
        *("judge.enabled=false", "stream.batch_size=8", "train.steps=6", "train.batch_size=8"),
    ]
    code, _, errors = run("train", "folder", "--out", tmp_path / "out", overrides=overrides)
    assert code == 0, errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["delivered"] == 6 * 4
    assert "broken.png" in " ".join(report["notes"])
    code, _, errors = run("preview", "folder", "--out", tmp_path / "preview.png", "--count", 8, overrides=overrides)
    assert code == 0, errors
    with Image.open(tmp_path / "preview.png") as image:
        assert min(image.size) > 200
    code, _, errors = run("invert", "folder", overrides=[*overrides, "data.max_bad=0"])
    assert code == 2
    assert "broken.png" in errors
    assert "Traceback" not in errors

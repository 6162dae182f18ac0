"""An inversion killed at any moment and started again ends in the bank that an undisturbed one writes, to the byte."""

import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDIMScheduler
from sampling.denoisers.tiny import unet2d

# Reads seconds, methods and bank folders from its standard input. For each it starts a process that inverts into it,
# and says how that ended. With seconds, an alarm ends the process then, which as SIGKILL leaves it no last word. Its
# clock is its own, so that it has no more time where this test is held up.
INVERTER = textwrap.dedent(
    """
    import os, signal, sys, time
    from pathlib import Path

    import numpy as np
    from diffusers import DDIMScheduler, UNet2DModel  # diffusers imports at first use

    from streamaug.config import Config
    from streamaug.data import ImageSet
    from streamaug.inversion.methods import methods_for
    from streamaug.inversion.run import invert
    from streamaug.sampling.denoisers import inspect

    model, images = Path(sys.argv[1]), np.load(sys.argv[2])
    config = Config.model_validate({
        "model": {"path": str(model), "device": "cpu", "steps": 6},
        "bank": {
            "ddim": {"iterations": 2},
            "embedding": {"visits": 4, "checkpoint_every": 2},
            "shard_rows": 128,
        },
    })
    real = ImageSet.from_arrays(images, np.arange(len(images)) % 2, ["cat", "dog"])
    info = inspect(model)
    while line := sys.stdin.readline():
        seconds, names, path = line.split(" ", 2)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, float(seconds))
            bank = config.bank.model_copy(update={"methods": names.split(",")})
            methods = methods_for(config.model_copy(update={"bank": bank}), info, None)
            invert(real, path.strip(), methods, model_digest=info.digest, shard_rows=config.bank.shard_rows)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, time.monotonic() - began, flush=True)
    """
)
ROWS = 300  # of encode and ddim 5 groups in 3 shards, of embedding 3 groups


@pytest.fixture(scope="module")
def invert(tmp_path_factory) -> Iterator[Callable[..., float]]:
    """A function that inverts into a folder in a process of its own, killed after so many seconds, unless they are 0.

    Returns the seconds until the process ended. One interpreter imports everything, each process is a fork of it.
    """
    folder = tmp_path_factory.mktemp("inverter")
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    unet2d.build(folder / "model", scheduler=scheduler, num_class_embeds=3)
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (ROWS, 3, 8, 8), dtype=np.uint8))
    command = [sys.executable, "-c", INVERTER, str(folder / "model"), str(folder / "images.npy")]
    inverter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert inverter.stdin is not None and inverter.stdout is not None
    stdin, stdout = inverter.stdin, inverter.stdout

    def run(path: Path, kill_after: float = 0, methods: str = "encode,ddim") -> float:
        print(f"{kill_after:.6f}", methods, path, file=stdin, flush=True)
        status, seconds = stdout.readline().split()
        assert int(status) in ((0, -signal.SIGALRM) if kill_after else (0,))
        return float(seconds)

    yield run
    stdin.close()
    assert inverter.wait(timeout=100) == 0
    stdout.close()


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(
    ("kills", "methods"),
    [
        (3, "encode,ddim"),
        pytest.param(20, "encode,ddim", marks=pytest.mark.matrix),
        pytest.param(20, "encode,ddim,embedding", marks=[pytest.mark.matrix, pytest.mark.timeout(900)]),
    ],
)
def test_an_inversion_killed_at_random_moments_ends_in_the_same_bank(tmp_path, invert, kills, methods):
    invert = partial(invert, methods=methods)
    seconds = invert(tmp_path / "undisturbed")
    expected = contents(tmp_path / "undisturbed")
    assert {name.split("-")[0] for name in expected} == {".bank", "index.json", "rows", *methods.split(",")}
    unfinished = done = 0
    while done < kills or not unfinished:
        path = tmp_path / f"killed-{done}"
        moment = random.uniform(1e-6, seconds)
        invert(path, moment)
        if (path / "index.json").exists():
            seconds = moment  # enough, this time: what took longer was held up
        else:
            unfinished += 1
        invert(path)
        assert contents(path) == expected, f"killed after {moment:.4f} of {seconds:.4f} seconds"
        done += 1


def test_a_bank_killed_again_and_again_is_still_the_same(tmp_path, invert):
    seconds = invert(tmp_path / "undisturbed")
    for _ in range(3):
        invert(tmp_path / "killed", random.uniform(1e-6, seconds / 2))
    invert(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")

"""Every family through the command line, none treated specially; the README's tables are what comes of it.

STREAMAUG_WRITE_TABLES=1 pytest tests/sampling/test_families.py  writes the tables anew.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import LCMScheduler
from PIL import Image
from sampling.denoisers.tiny import consistency, deepfloyd_if, dit, flux, sd3, sdxl, stable_diffusion, unet2d
from typer.testing import CliRunner

from streamaug.cli import app
from streamaug.sampling import denoisers
from streamaug.sampling.solvers import page
from streamaug.sampling.solvers.table import SolverTable, solver_for

README = Path(__file__).parents[2] / "README.md"
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A model to preview. settings: what its configuration needs besides data and path, as `--set` says it."""

    label: str
    build: Callable[[Path], Any]
    family: str
    size: int
    settings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.label)


GUIDED = "recipes=[{kind: noise, depth: [0.5, 1], guidance: [2, 3]}]"
LCM = partial(
    stable_diffusion.build,
    pipeline="LatentConsistencyModelPipeline",
    scheduler=LCMScheduler(),
    time_cond_proj_dim=32,
)
CASES = [
    Case("UNet2DModel", partial(unet2d.build, in_channels=3, out_channels=3), "UNet2DModel", 8),
    Case("consistency model", partial(consistency.build, classes=4), "UNet2DModel", 8),
    Case("Stable Diffusion 1.x, 2.x", stable_diffusion.build, "StableDiffusion", 32, [GUIDED]),
    Case("latent consistency model (LCM)", LCM, "StableDiffusion", 32, [GUIDED]),
    Case("SDXL", sdxl.build, "StableDiffusionXL", 32, [GUIDED]),
    Case("DiT", dit.build, "DiT", 32, [GUIDED]),
    Case("Stable Diffusion 3", sd3.build, "Stable Diffusion 3", 32, [GUIDED]),
    Case("Flux", flux.build, "Flux", 32, [GUIDED]),
    Case("DeepFloyd IF", deepfloyd_if.build, "DeepFloydIF", 32, [GUIDED]),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        case.build(root / case.folder)
    return {case.label: root / case.folder for case in CASES}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for index in range(3):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_preview_draws_images_of_every_family(case, folders, images, tmp_path):
    config = tmp_path / "config.yaml"
    size = denoisers.inspect(folders[case.label], case.size).image_shape[1]
    config.write_text(
        f"cache: {tmp_path / 'cache'}\n"
        f"data: {{source: folder, root: {images}, image_size: {size}, channels: 3, holdout: 0, validation: 0}}\n"
        f"model: {{path: {folders[case.label]}, steps: {STEPS}, compile: false}}\n"
        "recipes: [{kind: noise, depth: [0.5, 1]}]\n"
        "judge: {enabled: false}\nstream: {backend: local, batch_size: 4}\n"
    )
    out = tmp_path / "preview.png"
    settings = [part for each in case.settings for part in ("--set", each)]
    result = CliRunner().invoke(app, ["preview", str(config), "--out", str(out), "--count", "4", *settings])
    assert result.exit_code == 0, result.output
    assert np.asarray(Image.open(out)).std() > 0


def families_table(folders: dict[str, Path]) -> str:
    rows = ["| family | saved by | a label becomes | guidance | its own scheduler runs |", "|---|---|---|---|---|"]
    becomes = {"none": "nothing", "class": "a class embedding", "prompt": "a prompt, or inverted embeddings"}
    guides = {"none": "by the judge", "cfg": "two halves", "embedded": "an input"}
    for case in CASES:
        info = denoisers.inspect(folders[case.label], case.size)
        assert info.family == case.family
        scheduler = denoisers.load_scheduler(folders[case.label])
        when = denoisers.timing(info, scheduler, STEPS)
        fused = isinstance(solver_for(scheduler, STEPS, timing=when), SolverTable)
        runs = f"{'fused' if fused else 'stepped'} (`{type(scheduler).__name__}`)"
        rows.append(
            f"| {case.label} | `{info.pipeline}` | {becomes[info.conditioning]} | {guides[info.guidance]} | {runs} |"
        )
    return "\n".join(rows)


def schedulers_table() -> str:
    found: dict[str, dict[str, None]] = {"fused": {}, "stepped": {}, "refused": {}}
    for row in page.rows():
        setting = ", ".join(f"{key}={value}" for key, value in (row.config | row.options).items())
        name = row.name.removesuffix("Scheduler")
        if setting and row.runs == "fused":
            continue
        found[row.runs][f"{name} ({setting})" if setting else name] = None
    lines = ["| runs | schedulers |", "|---|---|"]
    return "\n".join([*lines, *(f"| {how} | {', '.join(names)} |" for how, names in found.items())])


def check(name: str, table: str) -> None:
    """The README's table between its markers is this one."""
    text = README.read_text("utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    assert pattern.search(text), f"README.md has no <!-- {name} --> table"
    current = pattern.sub(lambda match: match[1] + table + "\n" + match[2], text)
    if os.environ.get("STREAMAUG_WRITE_TABLES"):
        README.write_text(current, "utf-8")
    assert README.read_text("utf-8") == current, "the README has another table; STREAMAUG_WRITE_TABLES=1 writes it"


def test_the_readme_lists_the_families_as_they_run(folders):
    covered = {case.family for case in CASES}
    assert covered == set(denoisers.FAMILIES), "a family without a case here"
    check("families", families_table(folders))


def test_the_readme_lists_the_schedulers_as_they_run():
    check("schedulers", schedulers_table())

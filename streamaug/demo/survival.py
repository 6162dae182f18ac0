"""Does the label survive? Each recipe at increasing strength, judged by a classifier that saw all real labels.

    python -m streamaug.demo.survival digits --recipe noise --recipe interpolate --out survival.json

What a recipe's depth or weight should be at most is read off this table. The classifier is not the stream's judge: it
is trained on every labelled training image, and its own accuracy on held-out ones bounds what can be seen here.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from streamaug.config import Config, load
from streamaug.data import Batches
from streamaug.demo.view import make_view
from streamaug.doctor import hardware, installed_versions
from streamaug.errors import StreamaugError
from streamaug.experiment import real_batches
from streamaug.outputs import write_json
from streamaug.preparation import Prepared, prepare
from streamaug.preview import engine_of
from streamaug.sweep import find_recipe, strength_of, sweep
from streamaug.training.classifiers import build_classifier
from streamaug.training.trainer import accuracy, forever, train

_SIZE = 64  # images a batch


def survival(prepared: Prepared, names: list[str], *, images: int, steps: int) -> dict[str, Any]:
    """For each recipe and strength how many labels survive, of all images and of those that the judge accepted.

    names: as `sweep.find_recipe` takes them. images: how many a strength. steps: optimizer steps of the classifier.
    """
    oracle, reached = _oracle(prepared, steps)
    engine = engine_of(prepared)
    tables = []
    for name in names:
        recipe = find_recipe(prepared.config.recipes, name)
        what, amounts = strength_of(recipe, prepared.planner.schedule)
        rows = []
        for each in sweep(prepared, engine, recipe, amounts, size=_SIZE, batches=-(-images // _SIZE)):
            right = _agrees(oracle, each.images, each.labels)
            rows.append(
                {
                    what: each.amount,
                    "images": len(each.labels),
                    "survives": float(right.mean()),
                    "accepted": float(each.kept.mean()),
                    "survives_accepted": float(right[each.kept].mean()) if each.kept.any() else None,
                }
            )
        tables.append({"recipe": recipe.model_dump(mode="json"), "strength": what, "rows": rows})
    return {"classifier_accuracy": reached, "tables": tables}


def _oracle(prepared: Prepared, steps: int) -> tuple[torch.nn.Module, float]:
    """A classifier trained on all labelled training images, and its accuracy on the validation split."""
    config, splits = prepared.config, prepared.splits
    settings = config.train.model_copy(update={"steps": steps})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_classifier(
            settings.classifier,
            channels=config.data.channels,
            image_size=config.data.image_size,
            num_classes=len(prepared.class_names),
        )
        train(model, forever(real_batches(splits.train, settings, config.seed)), settings, seed=config.seed)
    return model.eval(), accuracy(model, Batches(splits.validation))


@torch.no_grad()
def _agrees(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which images [n, C, H, W] the classifier takes for their label, bool [n]."""
    found = [model(part.float() / 255).argmax(1).numpy() for part in torch.from_numpy(images).split(512)]
    return np.concatenate(found) == labels


def as_markdown(found: dict[str, Any]) -> str:
    """The tables, one after the other."""
    lines = []
    for table in found["tables"]:
        recipe = table["recipe"]
        what = f"{recipe['kind']}: {table['strength']}"
        if recipe["kind"] == "interpolate":
            what = f"interpolate, {recipe['latents']} latents, {recipe['mode']}: t"
        lines += [
            f"| {what} | label survives | accepted | survives among accepted |",
            "|---|---|---|---|",
        ]
        for row in table["rows"]:
            among = "" if row["survives_accepted"] is None else f"{row['survives_accepted']:.0%}"
            lines.append(f"| {row[table['strength']]:g} | {row['survives']:.0%} | {row['accepted']:.0%} | {among} |")
        lines.append("")
    return "\n".join(lines)


def main(
    config: Annotated[str, typer.Argument(metavar="CONFIG")] = "digits",
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe's position or kind. Repeatable.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images at each strength.")] = 640,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the classifier.")] = 1500,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
) -> None:
    """Measure how often the label survives each recipe, by strength."""
    settings: Config = load(config, overrides or [])
    whole = {"classes": None, "weight": 1.0}
    chosen = [find_recipe(settings.recipes, name).model_copy(update=whole) for name in recipe or ["0"]]
    with make_view() as view:
        # Prepared for what is measured, so that a recipe whose rows no method writes is refused at once.
        prepared = prepare(settings.model_copy(update={"recipes": chosen}), progress=view)
        view.phase("measuring")
        found = survival(prepared, [str(position) for position in range(len(chosen))], images=images, steps=steps)
    typer.echo(f"The classifier is right on {found['classifier_accuracy']:.1%} of held-out images.\n")
    typer.echo(as_markdown(found))
    if out is not None:
        described = {"config": settings.model_dump(mode="json", exclude={"cache"}), "images": images, "steps": steps}
        write_json(described | {"hardware": hardware(), "versions": installed_versions()} | found, out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except StreamaugError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None

"""`streamaug bank VERB`: look at a bank, check it, put several together, drop rows."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streamaug.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

bank_app = typer.Typer(help="Look at latent banks, check, merge and thin them.", no_args_is_help=True)

BankArgument = Annotated[Path, typer.Argument(metavar="BANK", help="The bank's folder.")]
_LISTED = 20  # lines of a list that are printed


@bank_app.command("info", epilog="Example: streamaug bank info digits-bank")
def bank_info(
    bank: BankArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show rows, classes, methods with their settings, tensors, quality and size on disk."""
    import json

    from streamaug.bank import LatentBank
    from streamaug.bank.info import info

    found = info(LatentBank.open(bank))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    _print_info(found, Console(highlight=False))


@bank_app.command("verify", epilog="Example: streamaug bank verify digits-bank --against photos/validation")
def bank_verify(
    bank: BankArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Drop the damaged rows and list them.")] = False,
    against: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Images that must not have been inverted, at any depth.")
    ] = None,
    distance: Annotated[
        int | None,
        typer.Option(
            min=0, max=256, help="Bits in which near-duplicates' hashes may differ; default: 2 (8 × 8) to 11."
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="How --against is read: crop, letterbox or stretch; default: as the bank's.")
    ] = None,
) -> None:
    """Check all checksums and numbers, and with --against that no validation image was inverted.

    Exits with 1 when something is wrong.
    """
    if against is None and (distance is not None or fit is not None):
        raise UsageError("--distance and --fit are for --against: give a folder of images to compare with")
    if fit not in (None, "crop", "letterbox", "stretch"):
        raise UsageError(f"--fit {fit}: accepted are crop, letterbox and stretch")
    from streamaug.bank import verify as checks

    found = checks.repair(bank) if repair else checks.verify(bank)
    for line in found.problems:
        typer.echo(line, err=True)
    if repair and found.names:
        typer.echo(f"Dropped {len(found.names)} of {len(found.damaged)} rows:")
        for row, name in zip(found.damaged.nonzero()[0].tolist(), found.names, strict=True):
            typer.echo(f"  row {row}: {name}")
    elif found.problems:
        typer.echo(
            f"{_counted(len(found.problems), 'problem')}. `streamaug invert` computes these rows again; "
            f"`streamaug bank verify {bank} --repair` drops them.",
            err=True,
        )
        raise typer.Exit(1)
    else:
        typer.echo(f"{bank}: {len(found.damaged)} rows, every checksum fits, every number is finite")
    if against is not None:
        _compare(bank, against, distance, fit)


@bank_app.command("merge", epilog="Example: streamaug bank merge bank-a bank-b --out both")
def bank_merge(
    banks: Annotated[list[Path], typer.Argument(metavar="BANK BANK...", help="Banks of one model and one method.")],
    out: Annotated[Path, typer.Option(help="Folder for the new bank.")],
) -> None:
    """Put banks together. Duplicates, by pixels and class, are kept once."""
    from streamaug.bank.edit import merge

    merged = merge(banks, out)
    typer.echo(f"Bank: {out} ({merged.rows} rows; {merged.duplicates} duplicates left out)")


@bank_app.command("drop", epilog='Example: streamaug bank drop digits-bank --out good --quality "ddim.error>0.1"')
def bank_drop(
    bank: BankArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for the bank without these rows.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace the bank itself.")] = False,
    classes: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="All rows of a class. Repeatable.")
    ] = None,
    hashes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text file with a source hash or source name on each line.")
    ] = None,
    quality: Annotated[
        str | None, typer.Option(metavar="CONDITION", help='A row array compared with a number: "ddim.error>0.1".')
    ] = None,
) -> None:
    """Drop the rows that one of the options names."""
    if (out is None) != in_place:
        raise UsageError("give either --out FOLDER, for a new bank, or --in-place, to replace this one")
    from streamaug.bank.edit import drop

    dropped = drop(bank, out, classes=classes or (), hashes=hashes, quality=quality)
    for name, count in dropped.by_class.items():
        typer.echo(f"  {name}: {_counted(count, 'row')} dropped")
    if dropped.unmatched:
        typer.echo(f"  {dropped.unmatched} lines of {hashes} are not in the bank")
    typer.echo(f"Bank: {out or bank} ({dropped.left} rows left, {dropped.rows} dropped)")


def _compare(bank: Path, folder: Path, distance: int | None, fit: Any) -> None:
    """Print the images of a folder that were inverted, and leave with 1 if there are any."""
    from streamaug.bank import LatentBank
    from streamaug.bank.verify import compare

    found = compare(LatentBank.open(bank), folder, distance, fit)
    for line in found.unreadable[:_LISTED]:
        typer.echo(f"not compared: {line}", err=True)
    if len(found.unreadable) > _LISTED:
        typer.echo(f"not compared: {len(found.unreadable) - _LISTED} more", err=True)
    if not found.perceptual:
        typer.echo(f"{bank} has no perceptual hashes: only images of the very same pixels are found", err=True)
    for leak in found.leaks:
        alike = "the same pixels" if leak.bits is None else f"{leak.bits} bits of its perceptual hash differ"
        typer.echo(f"{leak.file} was inverted: row {leak.row}, {leak.name} ({alike})", err=True)
    if found.leaks:
        files = len({leak.file for leak in found.leaks})
        typer.echo(f"{files} of {found.images} images of {folder} were inverted", err=True)
        raise typer.Exit(1)
    typer.echo(f"None of {found.images} images of {folder} was inverted")


def _print_info(found: dict[str, Any], console: "Console") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    meta = ", ".join(f"{key} {value}" for key, value in found["meta"].items())
    console.print(escape(f"{found['path']}: {found['rows']} rows, {_size(found['bytes'])} in {found['files']} files"))
    console.print(escape(meta))
    for edit in found["edits"]:
        console.print(escape(edit))
    classes = Table("class", "rows", title="Classes", title_justify="left")
    for name, count in found["classes"].items():
        classes.add_row(escape(name), str(count))
    console.print(classes)
    for part in found["parts"]:
        title = (
            f"{part['name']}: {_size(part['bytes'])} in {_counted(part['shards'], 'shard')}, "
            f"groups of {part['group_rows']} rows"
        )
        console.print(escape(title))
        console.print(escape("  " + ", ".join(f"{key} {value}" for key, value in part["meta"].items())))
        for name, form in part["tensors"].items():
            console.print(escape(f"  {name} {form['dtype']} {form['shape'] or 'a row'}"))
    if found["row_arrays"]:
        columns = list(next(iter(found["row_arrays"].values())))
        quality = Table(title="Quality", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("row array", *columns):
            quality.add_column(name, no_wrap=True)
        for name, values in found["row_arrays"].items():
            quality.add_row(escape(name), *(f"{values[column]:.2g}" for column in columns))
        console.print(quality)
    console.print(f"digest {found['digest']}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _size(count: int) -> str:
    """Bytes with a unit, in powers of ten."""
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"

"""The command line, `streamaug VERB CONFIG`: each verb reads the configuration and calls one function.

Exit codes: 0 done, 1 something failed, 2 what was given cannot be used, 130 interrupted, 143 terminated.
"""

import errno
import json
import logging
import os
import signal
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from streamaug.bank.cli import bank_app
from streamaug.errors import StreamaugError, UsageError

if TYPE_CHECKING:
    from streamaug.config import Config


class _Verbs(TyperGroup):
    """Ends every verb with one message on stderr and the exit code that belongs to it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StreamaugError as error:
            _stop(ctx, f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            _stop(ctx, "interrupted", 128 + signal.SIGINT)
        except _Terminated as terminated:
            _stop(ctx, "terminated", terminated.exit_code)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            where = f"{error.filename}: " if error.filename else ""
            _stop(ctx, f"error: {where}{error.strerror}", 1)


class _Terminated(BaseException):
    """A signal asked to leave: by way of every `finally`, so that producers and memory are cleaned up."""

    def __init__(self, number: int):
        self.exit_code = 128 + number


def _stop(ctx: Any, message: str, code: int) -> NoReturn:
    if ctx.params.get("debug"):
        traceback.print_exc()
    with suppress(OSError):  # the terminal may be what went away
        typer.echo(message, err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=_Verbs,
    name="streamaug",
    help="Train an image classifier on its real images and on new ones made from them while it trains.",
    epilog="Start with: streamaug demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(bank_app, name="bank")

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a bundled configuration.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value: loader.ratio=0.25. Repeatable."),
]


def main() -> None:
    """The console script."""
    # GNU OpenMP's threads wait for each other by spinning. On a busy machine that makes a training step up to 30 times
    # slower; spinning briefly costs nothing on a quiet one. It is read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)
    try:
        app()
    except _Terminated as terminated:  # before or after the verb
        raise SystemExit(terminated.exit_code) from None


def _leave(number: int, _frame: object) -> NoReturn:
    raise _Terminated(number)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"streamaug {version('streamaug')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="STREAMAUG_DEBUG", help="Show tracebacks and the log in detail."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    log = logging.getLogger("streamaug")
    log.handlers = [_LogLines()]
    log.setLevel(logging.DEBUG if debug else logging.INFO)
    log.propagate = False


class _LogLines(logging.Handler):
    """Writes to whatever stderr is at that moment, so that a live view can put lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(self.format(record), err=True)


@app.command(epilog="Example: streamaug demo --shots 1 --seeds 3 --out one-shot")
def demo(
    config: ConfigArgument = "digits",
    shots: Annotated[int | None, typer.Option(min=1, help="Labelled images per class.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many times everything is repeated.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed the repetitions derive from.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("demo-out"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Train the generator again.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="20 seeds and a real-only arm of equal wall time; no time limit.")
    ] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything tiny: does it run? Under a minute.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train a classifier without and with the stream, and report the difference."""
    if full and smoke:
        raise UsageError("--full and --smoke exclude each other: give one of them")
    options = {"data.shots": shots, "demo.seeds": seeds, "seed": seed}
    settings = _load(config, overrides, options)
    _need_folder(out)
    from streamaug.demo.pictures import require_matplotlib

    require_matplotlib()
    from streamaug.demo.run import run_demo
    from streamaug.demo.view import make_view

    with make_view() as view:
        report = run_demo(settings, out=out, fresh=fresh, full=full, smoke=smoke, view=view)
    typer.echo(report["verdict"])
    typer.echo(f"Report: {out / 'report.html'}")


@app.command(epilog="Example: streamaug train digits --out runs/half --set loader.ratio=0.5")
def train(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="Folder for report.json.")],
    real_only: Annotated[bool, typer.Option("--real-only", help="Train without the stream.")] = False,
    manifest: Annotated[
        Path | None, typer.Option(help="Record what is delivered, for `streamaug replay`; default: stream.manifest.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Train one classifier on real images and the stream."""
    settings = _load(config, overrides, {"stream.manifest": str(manifest) if manifest else None})
    _need_folder(out)
    from streamaug.demo.view import make_view
    from streamaug.experiment import train_run

    with make_view() as view:
        report = train_run(settings, out=out, view=view, real_only=real_only)
    typer.echo(f"Held-out accuracy: {report['accuracy']:.1%}")
    typer.echo(f"Report: {out / 'report.json'}")


@app.command(epilog="Example: streamaug invert digits --out digits-bank --set data.shots=5")
def invert(
    config: ConfigArgument,
    out: Annotated[Path | None, typer.Option(help="Folder for the bank; default: bank.path.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure one group and say what the whole job takes; write no bank.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Invert the real images into a latent bank. Interrupted, it goes on where it stopped."""
    settings = _load(config, overrides, {"bank.path": str(out) if out else None})
    from streamaug.demo.view import make_view
    from streamaug.inverting import estimate_configured, invert_configured

    with make_view() as view:
        if dry_run:
            estimate = estimate_configured(settings, progress=view)
        else:
            bank = invert_configured(settings, progress=view)
    if dry_run:
        typer.echo(str(estimate))
    else:
        typer.echo(f"Bank: {bank.path} ({bank.num_rows} images)")


@app.command(epilog="Example: streamaug preview digits --out preview.png --recipe noise")
def preview(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option(min=1, max=1024, help="How many images to show.")] = 32,
    recipe: Annotated[
        str | None,
        typer.Option(help="Show one recipe at increasing strength: its position in the configuration, or its kind."),
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Draw what the stream would deliver, or what one recipe does to real images at increasing strength."""
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a file name that ends in .png")
    if out.is_dir():
        raise UsageError(f"--out {out}: a folder, expected the name of the PNG to write")
    settings = _load(config, overrides)
    _need_folder(out.parent)
    from streamaug.demo.view import make_view
    from streamaug.preview import draw_delivered, draw_recipe

    with make_view() as view:
        drawn = (
            draw_delivered(settings, out, count, view) if recipe is None else draw_recipe(settings, out, recipe, view)
        )
    typer.echo(f"Picture: {out} ({drawn} images)")


@app.command(epilog="Example: streamaug replay run.manifest --ids 48213 48214 --out again")
def replay(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The file that stream.manifest named.")],
    more_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="More ids.", hidden=True)] = None,
    ids: Annotated[list[str] | None, typer.Option(metavar="ID...", help="Images to make again.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files of --ids.")] = Path("replayed"),
    rejected: Annotated[bool, typer.Option("--rejected", help="Also write ids that the judge rejected.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write all delivered images there; goes on where it stopped.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="Of --export: png, one folder a class, or webdataset, .tar shards.")
    ] = "png",
    id_range: Annotated[
        str | None, typer.Option("--range", metavar="FROM:TO", help="Of --export: only these ids, without TO.")
    ] = None,
    any_version: Annotated[
        bool, typer.Option("--any-version", help="Also where versions or the device differ, and images may slightly.")
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=PATH", help="What is elsewhere now: model.path=FOLDER, bank.path=..., cache=..."
        ),
    ] = None,
) -> None:
    """Make images of a run again, bit for bit: single ones by id, or the whole set on disk."""
    wanted = _numbers([*(ids or []), *(more_ids or [])])
    if bool(wanted) == (export is not None):
        raise UsageError("give either --ids with the images to make again, or --export with a folder for all of them")
    if form not in ("png", "webdataset"):
        raise UsageError(f"--format {form}: accepted are png and webdataset")
    if export is not None and rejected:
        raise UsageError("--rejected is for --ids: an export holds what was delivered")
    if export is None and id_range is not None:
        raise UsageError("--range is for --export: name the images of --ids one by one")
    _need_folder(out) if export is None else _need_folder(export, "--export")
    from streamaug import replay as replaying
    from streamaug.demo.view import make_view

    options: dict[str, Any] = {"overrides": overrides or [], "any_version": any_version}
    with make_view() as view:
        if export is None:
            done = replaying.replay(manifest, wanted, out, rejected=rejected, progress=view, **options)
        else:
            part = None if id_range is None else replaying.parse_range(id_range)
            written = replaying.export(manifest, export, form, ids=part, progress=view, **options)
    if export is not None:
        typer.echo(f"Images: {export} ({written} delivered images)")
        return
    for line in done.left_out:
        typer.echo(line, err=True)
    for path in done.paths:
        typer.echo(path)


def _numbers(texts: list[str]) -> list[int]:
    """Ids, apart or with commas between them."""
    parts = [part for text in texts for part in text.split(",") if part]
    for part in parts:
        if not part.isdecimal():
            raise UsageError(f"--ids {part}: an id is a whole number from 0, such as 48213")
    return [int(part) for part in parts]


@app.command(epilog="Example: streamaug doctor digits --set stream.batch_size=256")
def doctor(config: ConfigArgument = "digits", overrides: SetOption = None) -> None:
    """Check this machine against a configuration and say what to do about what is wrong."""
    settings = _load(config, overrides)
    from streamaug.doctor import examine, print_checks

    checks = examine(settings)
    print_checks(checks)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(1)


@config_app.command("show", epilog="Example: streamaug config show digits --set loader.ratio=0.25")
def config_show(config: ConfigArgument = "digits", overrides: SetOption = None) -> None:
    """Print the complete configuration: the file, the defaults and the overrides put together."""
    typer.echo(_load(config, overrides).to_yaml(), nl=False)


@config_app.command("list", epilog="Example: streamaug config list")
def config_list() -> None:
    """List the configurations that come with the package."""
    from streamaug.config import bundled

    for name in bundled():
        typer.echo(name)


def _load(config: str, overrides: list[str] | None, options: Mapping[str, object] | None = None) -> "Config":
    """The configuration with --set first and then the verb's own options, where they were given."""
    from streamaug.config import load

    given = [f"{key}={json.dumps(value)}" for key, value in (options or {}).items() if value is not None]
    return load(config, [*(overrides or []), *given])


def _need_folder(folder: Path, option: str = "--out") -> None:
    """Create the folder, or say now rather than after the run that it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{folder}: a file, expected a folder; choose another {option}") from None
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to ({error.strerror}); choose another {option}") from None

"""`streamaug doctor`: is this machine ready for a configuration, and what to do about what is not."""

import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from streamaug.config import Config
from streamaug.errors import ModelError
from streamaug.stream.ring import Layout, Mailboxes, memory
from streamaug.stream.ring.memory import human

MIN_FREE_DISK_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, what was found, and what to do unless it is ok."""

    status: Literal["ok", "warn", "fail"]
    name: str
    found: str
    advice: str = ""


def examine(config: Config) -> list[Check]:
    """Every check, in the order they are read. Nothing is changed on the machine."""
    return [
        *_packages(),
        *_extras(config),
        *_devices(config),
        *_threads(config),
        *_ring(config),
        *_cache(config),
        *_inputs(config),
    ]


def print_checks(checks: list[Check]) -> None:
    """Print one aligned line per check, advice on the line below it, and a summary."""
    width = max(len(check.name) for check in checks)
    color = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        status = typer.style(f"{check.status:4}", fg=color[check.status], bold=check.status != "ok")
        typer.echo(f"{status}  {check.name:{width}}  {check.found}")
        if check.advice:
            typer.echo(f"{'':6}{'':{width}}  -> {check.advice}")
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    if failed:
        typer.echo(f"{failed} to repair, {warned} to know about")
    else:
        typer.echo(f"ready; {warned} to know about" if warned else "ready")


def installed_versions() -> dict[str, str]:
    """Versions of Python, of streamaug and of what it needs to run, by name."""
    names = ["streamaug", *(need.package for need in _requirements() if not need.extra), "triton"]
    found = {name: _version(name) for name in names}
    return {
        "python": platform.python_version(),
        **{name: version for name, version in found.items() if version},
    }


def hardware() -> dict[str, str]:
    """The processor, its usable cores, memory and GPUs, in words."""
    import torch

    found = {"system": platform.platform(), "processor": _processor(), "cores": str(_cores())}
    nbytes = _memory_bytes()
    if nbytes:
        found["memory"] = human(nbytes)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(names)
    return found


@dataclass(frozen=True)
class _Requirement:
    package: str
    minimum: str  # "" for any version
    extra: str  # "" for what is always needed


def _requirements() -> list[_Requirement]:
    """What the installed streamaug asks for, from its own metadata."""
    try:
        lines = importlib.metadata.requires("streamaug") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        package = re.match(r"[\w.-]+", line)
        minimum = re.search(r">=\s*([\d.]+)", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if package:
            found.append(
                _Requirement(package.group(), minimum.group(1) if minimum else "", extra.group(1) if extra else "")
            )
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _at_least(version: str, minimum: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]

    return not minimum or numbers(version) >= numbers(minimum)


def _packages() -> Iterator[Check]:
    yield Check("ok", "python", f"{platform.python_version()} ({sys.executable})")
    yield Check("ok", "streamaug", _version("streamaug") or "running from its source folder")
    for need in _requirements():
        if need.extra:
            continue
        version = _version(need.package)
        install = f'pip install "{need.package}{">=" + need.minimum if need.minimum else ""}"'
        if not version:
            yield Check("fail", need.package, "not installed", install)
        elif not _at_least(version, need.minimum):
            yield Check("fail", need.package, f"{version}, older than {need.minimum}", install)
        else:
            yield Check("ok", need.package, version)
    for module in ("torchvision", "diffusers"):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken pair fails with whatever its native code raises
            yield Check(
                "fail",
                f"import {module}",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                "torch and torchvision must come from the same release: "
                "pip install --force-reinstall torch torchvision",
            )


def _extras(config: Config) -> Iterator[Check]:
    needs = [need for need in _requirements() if need.extra not in ("", "test")]
    for extra in dict.fromkeys(need.extra for need in needs):
        missing = [need.package for need in needs if need.extra == extra and not _version(need.package)]
        install = f'pip install "streamaug[{extra}]"'
        if not missing:
            yield Check("ok", f"extra {extra}", "installed")
        elif extra == "demo" and config.data.source == "digits":
            yield Check("fail", f"extra {extra}", f"not installed: {', '.join(missing)}", install)
        else:
            found = f"not installed: {', '.join(missing)}"
            yield Check("ok", f"extra {extra}", found, f"only if you want it: {install}")


def _devices(config: Config) -> Iterator[Check]:
    import torch

    wanted = config.model.device
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Check("ok", f"cuda:{index}", f"{name}, {human(free)} of {human(total)} free")
        if not _version("triton"):
            yield Check("warn", "triton", "not installed: slower reference kernels run", "pip install triton")
    elif wanted.startswith("cuda"):
        yield Check(
            "fail",
            "device",
            f"model.device is {wanted}, and torch finds no usable GPU",
            "--set model.device=cpu, or install a torch build and driver that match the GPU",
        )
    else:
        yield Check("ok", "device", f"cpu, {_processor()} (no GPU found)")


def _threads(config: Config) -> Iterator[Check]:
    cores = _cores()
    threads = config.stream.producers * config.stream.threads + config.train.threads
    found = f"{cores} cores; producers and training use {threads} threads"
    if threads > cores:
        advice = "processes that share cores slow each other down a lot: lower stream.threads or train.threads"
        yield Check("warn", "cpu threads", found, advice)
    else:
        yield Check("ok", "cpu threads", found)


def _ring(config: Config) -> Iterator[Check]:
    """Shared memory: how much there is and whether what the configuration needs fits."""
    folder, kind = memory.SHM_FOLDER, memory.choose(config.stream.memory)
    used = kind == "shm"
    if os.path.isdir(folder):
        size = human(shutil.disk_usage(folder).total)
        yield Check("ok", "shared memory", f"{folder} {size}{'' if used else f' (not used: the ring is in {kind})'}")
    elif used:
        yield Check("fail", "shared memory", f"no {folder}", "--set stream.memory=auto")
    else:
        yield Check("ok", "shared memory", f"no {folder} (not needed: the ring is in {kind})")
    stream = config.stream
    slots = math.ceil(stream.in_flight / stream.producers)
    ring_nbytes = Layout(stream.batch_size, _image_shape(config), slots).nbytes
    needed = stream.producers * ring_nbytes + Mailboxes.nbytes(stream.producers * slots + 2, _judge_nbytes(config))
    there = memory.available(kind)
    found = f"{human(needed)} needed, {human(there)} free ({kind})"
    if needed <= there:
        yield Check("ok", "ring memory", found)
    else:
        advice = "a smaller stream.batch_size or stream.in_flight"
        if used:
            advice += "; stream.memory=memfd; or more: docker run --shm-size=2g, mount -o remount,size=2g /dev/shm"
        yield Check("fail", "ring memory", found, advice)


def _judge_nbytes(config: Config) -> int:
    """Bytes of the judge's state, for as many classes as the data have; 0 without a judge."""
    if not config.judge.enabled:
        return 0
    from streamaug.filtering.calibration import build_judge
    from streamaug.filtering.judge import pack_state

    root = config.data.root
    folders = [item for item in root.iterdir() if item.is_dir()] if root and root.is_dir() else []
    return pack_state(build_judge(config, len(folders) or 10)).nbytes


def _image_shape(config: Config) -> tuple[int, int, int]:
    return config.data.channels, config.data.image_size, config.data.image_size


def _cache(config: Config) -> Iterator[Check]:
    folder = config.cache
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    advice = "set cache: in the YAML, or STREAMAUG_CACHE, to a folder on a disk with room"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        yield Check("fail", "cache", f"{folder}: cannot be written to ({error.strerror})", advice)
        return
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {human(free)} free"
    if free < MIN_FREE_DISK_BYTES:
        yield Check("warn", "cache", found, advice)
    else:
        yield Check("ok", "cache", found)


def _inputs(config: Config) -> Iterator[Check]:
    """The folders that the configuration names."""
    named = {"data.root": config.data.root, "data.test_root": config.data.test_root}
    for key, folder in named.items():
        if folder is None:
            continue
        if folder.is_dir():
            yield Check("ok", key, str(folder))
        else:
            yield Check("fail", key, f"{folder}: no such folder", f"--set {key}=A_FOLDER with one folder per class")
    if config.model.path is None:
        yield Check("ok", "model", "none named: a small one is trained into the cache")
        return
    from streamaug.sampling.denoisers import inspect

    try:
        model = inspect(config.model.path, config.data.image_size, config.model.variant, config.model.upscaler)
    except ModelError as error:
        yield Check("fail", "model", str(error), "set model.path to a folder that a diffusers pipeline saved")
        return
    wanted = _image_shape(config)
    if model.image_shape == wanted:
        yield Check("ok", "model", f"{model.path} ({model.family})")
    else:
        found = f"{model.path} makes {_by(model.image_shape)} images, the data section asks for {_by(wanted)}"
        advice = f"--set data.channels={model.image_shape[0]} --set data.image_size={model.image_shape[1]}"
        yield Check("fail", "model", found, advice)


def _by(shape: tuple[int, int, int]) -> str:
    return "x".join(str(side) for side in shape)


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0

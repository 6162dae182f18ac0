"""The embedding method, Diffusion Inversion (Zhou, Sahak and Ba 2023): for each image the condition that denoises it.

The model is frozen. What it is told of an image (a matrix of tokens, or a class embedding) starts as what it is told
of the image's class, and is fitted by gradient descent on the denoising loss of that image alone. Images of a group
are fitted together, for speed; their mean is the group's unconditional vector (`latents.row_conditioning`).
"""

import hashlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from streamaug.bank import Checkpoint, Part
from streamaug.config import Config, EmbeddingConfig
from streamaug.engine import load_settings, resolve_device, told_besides
from streamaug.errors import ConfigError, MemoryTooSmall, ModelError
from streamaug.inversion.encode import Codec
from streamaug.kernels.philox import normal
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.sampling.denoisers import FAMILIES, Denoiser, ModelInfo, load, load_scheduler
from streamaug.sampling.denoisers.base import NULL
from streamaug.sampling.denoisers.prompts import PromptTable
from streamaug.sampling.solvers.schedulers import configured, kind, make_scheduler, setting

PAIRS = 32  # (timestep, noise) pairs by which a row's loss is measured, the same for every row

# A row is a function of its image and the settings alone: another run's seed does not make it anew.
_SEED = 0
_FITTING_STREAM, _MEASURING_STREAM = 8, 9  # Philox streams of the noise
_BETAS, _EPS = (0.9, 0.999), 1e-8  # AdamW's, as everywhere
_LOOKS = 3  # in the visits of `patience`, at the mean of the losses since the last
_LOWER = 1e-3  # by what share a loss must be lower to count

Rows = dict[str, torch.Tensor]


class Embedding:
    """One conditioning matrix for each image.

    Tensors: "tokens" [n, d], and "pooled" [d] where the model is told one, for models that take prompts;
    "class_embedding" [d], or [blocks, d], for those that take a class. Row arrays: "embedding.loss", the denoising
    loss when the model is told the row, a mean over the same PAIRS for all rows; "embedding.class_loss", the same when
    it is told the class's own embedding or prompt.
    """

    def __init__(self, info: ModelInfo, config: Config, prompts: Path | None, codec: Codec | None = None):
        """prompts: the file of encoded prompts, for models that take them; the first wording is the start.

        Raises ConfigError for a model that is told nothing, and ModelError for one whose denoising loss is not known.
        """
        if info.conditioning == "none":
            others = ", ".join(name for name in FAMILIES if name != info.family)
            raise ConfigError(
                f"bank.methods: 'embedding' fits what a model is told, and {info.path} ({info.pipeline}) is told "
                "nothing; accepted are a UNet2DModel with class embeddings, such as prior.labels: true trains, and "
                f"models of {others}; for this one use encode or ddim"
            )
        self._info, self._config, self._prompts = info, config, prompts
        self._settings = config.bank.embedding
        self._device = resolve_device(config.model.device)
        self._codec = codec or Codec(info, self._device, config.model.variant)
        scheduler = make_scheduler(load_scheduler(info.path), config.model.scheduler)
        self._levels = trained_levels(configured(scheduler, config.model.scheduler_config))
        # float16 has too small a range for gradients.
        half = self._device.type == "cuda" and config.model.dtype != "float32" and torch.cuda.is_bf16_supported(False)
        self._dtype = torch.bfloat16 if half else torch.float32
        self.part = Part(
            "embedding",
            meta={
                "model": info.digest,
                "class_ids": info.class_ids,
                "levels": self._levels.digest,
                "start": None if prompts is None else _digest_of_start(prompts),
                "pairs": PAIRS,
                "network_dtype": str(self._dtype).removeprefix("torch."),
                **told_besides(config.model),
                **self._settings.model_dump(mode="json", exclude={"group_rows", "checkpoint_every"}),
            },
            group_rows=self._settings.group_rows,
            dtype=config.bank.dtype,
            row_bytes=0 if prompts is None else _row_bytes(prompts, self._settings.tokens, config.bank.dtype),
        )

    def compute(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray, checkpoint: Checkpoint
    ) -> dict[str, torch.Tensor]:
        """Images uint8 [G, C, H, W], labels int64 [G] and bank rows int64 [G] to the tensors, [G, ...] fp32.

        A row that is there twice, as padding is, is fitted once. Interrupted and called again with what it saved to
        the checkpoint, the result is the same to the bit. Raises MemoryTooSmall.
        """
        _, first, back = np.unique(rows, return_index=True, return_inverse=True)
        group = self._group(images[first], rows[first])
        try:
            with _deterministic(self._device):
                told = self._denoiser.class_rows(labels[first])
                found = fit(group, self._start(told), self._settings, checkpoint)
                losses = {"embedding.loss": group.measure(found), "embedding.class_loss": group.measure(told)}
        except torch.OutOfMemoryError:
            raise MemoryTooSmall(
                f"bank.embedding.batch_size {group.batch_size} needs more memory than {self._device} has free for the "
                "network's activations; set a smaller one"
            ) from None
        return {name: value.float().cpu()[torch.from_numpy(back)] for name, value in (found | losses).items()}

    def rehearse(self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> tuple[float, Rows]:
        """How many seconds an image takes in `compute` when its group does not end early, and such tensors [n, ...].

        Measured on two visits, for an estimate before hours of work. The arguments are those of `compute`.
        """
        _, first = np.unique(rows, return_index=True)
        group = self._group(images[first], rows[first])
        told = self._denoiser.class_rows(labels[first])
        start, brief = self._start(told), self._settings.model_copy(update={"visits": 1, "patience": 0})
        fit(group, start, brief, Checkpoint(None))  # whatever is done once, at the first
        began = time.perf_counter()
        found = {name: value.cpu() for name, value in fit(group, start, brief, Checkpoint(None)).items()}
        fitted = time.perf_counter()
        loss = group.measure(told).cpu()
        seconds = (fitted - began) * self._settings.visits + 2 * (time.perf_counter() - fitted)
        return seconds / group.size, {**found, "embedding.loss": loss, "embedding.class_loss": loss}

    def _group(self, images: np.ndarray, rows: np.ndarray) -> "Group":
        latents = self._codec.encode(images).to(self._device)
        return Group(self._denoiser, self._levels, latents, rows, self._settings.batch_size)

    def _start(self, told: Rows) -> Rows:
        """The class's rows, with `tokens` of a prompt's: the first, the last, and evenly spaced ones between.

        Not the first few: CLIP's know nothing of the words after them, so "a photo of a" would be all classes' start,
        and not their mean, since equal tokens get equal gradients and stay one.
        """
        if "tokens" not in told:
            return told
        length = told["tokens"].shape[1]
        kept = np.linspace(0, length - 1, min(self._settings.tokens, length)).round().astype(np.int64)
        return told | {"tokens": told["tokens"][:, torch.from_numpy(kept).to(self._device)]}

    @cached_property
    def _denoiser(self) -> Denoiser:
        settings = load_settings(self._config, self._info, self._device, self._dtype, self._prompts, decodes=False)
        return load(self._info, settings)


@dataclass(frozen=True)
class Levels:
    """The noise levels a network was trained at: at each, fp32 [T], its timestep, the latent's share of signal and of
    noise, and what the network is to predict: `clean` times the image and `noisy` times the noise."""

    timesteps: torch.Tensor
    signal: torch.Tensor
    noise: torch.Tensor
    clean: torch.Tensor
    noisy: torch.Tensor

    @property
    def digest(self) -> str:
        parts = (self.timesteps, self.signal, self.noise, self.clean, self.noisy)
        return hashlib.sha256(torch.stack(parts).numpy().tobytes()).hexdigest()[:16]


def trained_levels(scheduler: Any) -> Levels:
    """The levels of a diffusers scheduler's network, for epsilon, v_prediction, sample and flow matching.

    Raises ModelError for other schedulers.
    """
    trained = int(scheduler.config.get("num_train_timesteps", 0))
    name = type(scheduler).__name__
    if kind(type(scheduler), scheduler.config) == "flow matching":
        noise = torch.arange(1, trained + 1, dtype=torch.float64) / trained
        if not scheduler.config.get("use_dynamic_shifting"):
            shift = setting(scheduler, "shift") or setting(scheduler, "flow_shift") or 1.0
            noise = shift * noise / (1 + (shift - 1) * noise)
        one = torch.ones_like(noise)
        levels = trained * noise, 1 - noise, noise, -one, one
        return Levels(*(each.float() for each in levels))
    predicts = scheduler.config.get("prediction_type", "epsilon")
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None or predicts not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"bank.methods: 'embedding' does not know the denoising loss of a model with {name} predicting "
            f"{predicts}; accepted are diffusion models that predict epsilon, v_prediction or sample, and flow matching"
        )
    if scheduler.config.get("timestep_type") == "continuous":
        raise ModelError(f"bank.methods: 'embedding' needs whole timesteps, {name} has timestep_type continuous")
    signal, noise = kept.double().sqrt(), (1 - kept.double()).sqrt()
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    wanted = {"epsilon": (zero, one), "v_prediction": (-noise, signal), "sample": (one, zero)}[predicts]
    levels = torch.arange(len(signal), dtype=torch.float64), signal, noise, *wanted
    return Levels(*(each.float() for each in levels))


class Group:
    """Images that are fitted together, and the loss of what a model is told of them."""

    def __init__(self, denoiser: Denoiser, levels: Levels, latents: torch.Tensor, rows: np.ndarray, batch_size: int):
        """latents: fp32 [n, c, h, w]; rows: int64 [n], their bank rows, all different, by which noise is drawn."""
        self.denoiser, self.latents, self.rows = denoiser, latents, rows
        self.size, self.batch_size = len(latents), min(batch_size, len(latents))
        self.batches = -(-self.size // self.batch_size)  # a visit
        of_level = (levels.timesteps, levels.signal, levels.noise, levels.clean, levels.noisy)
        self._of_level = torch.stack(of_level).to(latents.device)  # [5, T]

    def draw(self, visit: int, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which images a batch of a visit has, int64 [b], at which levels, int64 [b], and noise fp32 [b, c, h, w].

        A visit goes through all images once, in an order of its own.
        """
        device, levels = self.latents.device, self._of_level.shape[1]
        key = np.array([_SEED, self.rows[0]], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, visit]))
        at = np.array_split(rng.permutation(self.size), self.batches)[batch]
        chosen = rng.integers(levels, size=self.size)[at]
        ids = torch.from_numpy(self.rows[at] + (visit << 40)).to(device)
        noise = normal(ids, self.latents.shape[1:], seed=_SEED, stream=_FITTING_STREAM)
        return torch.from_numpy(at).to(device), torch.from_numpy(chosen).to(device), noise

    def losses(
        self, told: Mapping[str, torch.Tensor], at: torch.Tensor, levels: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error fp32 [b] of the network's prediction when it is told these rows [b, ...]."""
        clean = self.latents[at]
        timesteps, *shares = self._of_level[:, levels]
        signal, noisiness, of_clean, of_noise = (share.view(-1, 1, 1, 1) for share in shares)
        given = (signal * clean + noisiness * noise).to(self.denoiser.dtype)
        if self.denoiser.settings.channels_last:
            given = given.contiguous(memory_format=torch.channels_last)
        conditioning = self.denoiser.condition(_by_rows(len(at)), told, False)
        predicted = self.denoiser(given, timesteps, conditioning)[:, : clean.shape[1]].float()
        return (predicted - of_clean * clean - of_noise * noise).square().flatten(1).mean(1)

    @torch.no_grad()
    def measure(self, told: Rows) -> torch.Tensor:
        """Each image's loss fp32 [n], the mean over PAIRS evenly spaced levels, each with one noise for all images."""
        device, count = self.latents.device, self._of_level.shape[1]
        levels = (2 * torch.arange(PAIRS, device=device) + 1) * count // (2 * PAIRS)
        noises = normal(
            torch.arange(PAIRS, device=device), self.latents.shape[1:], seed=_SEED, stream=_MEASURING_STREAM
        )
        losses = []
        for at in torch.arange(self.size, device=device).split(self.batch_size):
            rows = {name: value[at] for name, value in told.items()}
            of_pairs = [
                self.losses(rows, at, level.expand(len(at)), noise.expand(len(at), -1, -1, -1))
                for level, noise in zip(levels, noises, strict=True)
            ]
            losses.append(torch.stack(of_pairs).mean(0))
        return torch.cat(losses)


@torch.enable_grad()
def fit(group: Group, start: Rows, settings: EmbeddingConfig, checkpoint: Checkpoint) -> Rows:
    """The rows [n, ...] after AdamW has lowered the group's loss, until it no longer falls or the visits are over."""
    saved = checkpoint.load()
    state = _State.begin(start) if saved is None else _State.restored(saved, group.latents.device)
    every = max(settings.patience // _LOOKS, 1)
    while state.step < settings.visits * group.batches:
        visit, batch = divmod(state.step, group.batches)
        at, levels, noise = group.draw(visit, batch)
        told = {name: value[at].requires_grad_() for name, value in state.rows.items()}
        losses = group.losses(told, at, levels, noise)
        gradients = torch.autograd.grad(losses.sum(), list(told.values()))
        for name, gradient in zip(told, gradients, strict=True):
            state.descend(name, at, gradient, visit, settings.lr, settings.weight_decay)
        state.loss += losses.detach().sum().double()
        state.step += 1
        visits, within = divmod(state.step, group.batches)
        if within == 0:
            checkpoint.reached(visits / settings.visits)
        if settings.patience and within == 0 and visits % every == 0:
            state.look(visits, losses=every * group.size)
            if visits - state.best_visit >= settings.patience:
                break
        if state.step % settings.checkpoint_every == 0:
            checkpoint.save(state.tensors())
    return state.rows


@dataclass
class _State:
    """How far a group is, all of it in a checkpoint: its rows, AdamW's two moments, and what a plateau is known by.

    loss: the sum of the losses since the last look at them, fp64 []; step: optimizer steps done; best: the lowest
    mean loss at a look, and after how many visits that was.
    """

    rows: Rows
    first: Rows
    second: Rows
    loss: torch.Tensor
    step: int = 0
    best: float = float("inf")
    best_visit: int = 0

    @classmethod
    def begin(cls, start: Rows) -> "_State":
        rows = {name: value.detach().float().clone() for name, value in start.items()}
        first, second = ({name: torch.zeros_like(value) for name, value in rows.items()} for _ in range(2))
        return cls(rows, first, second, next(iter(rows.values())).new_zeros((), dtype=torch.float64))

    @classmethod
    def restored(cls, saved: Mapping[str, torch.Tensor], device: torch.device) -> "_State":
        rows, first, second = (
            {name.removeprefix(kept): value.to(device) for name, value in saved.items() if name.startswith(kept)}
            for kept in ("rows.", "first.", "second.")
        )
        step, best, best_visit = (saved[name].item() for name in ("step", "best", "best_visit"))
        return cls(rows, first, second, saved["loss"].to(device), int(step), best, int(best_visit))

    def tensors(self) -> Rows:
        by_kind = {"rows.": self.rows, "first.": self.first, "second.": self.second}
        counts = {"step": self.step, "best": self.best, "best_visit": self.best_visit}
        return {
            **{kept + name: value for kept, tensors in by_kind.items() for name, value in tensors.items()},
            **{name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()},
            "loss": self.loss,
        }

    def descend(self, name: str, at: torch.Tensor, gradient: torch.Tensor, visit: int, lr: float, decay: float) -> None:
        """AdamW's step (Loshchilov & Hutter 2019) for the rows that were visited; the others' moments keep still."""
        gradient, before = gradient.float(), self.rows[name][at]
        self.first[name][at] = first = self.first[name][at].lerp(gradient, 1 - _BETAS[0])
        self.second[name][at] = second = self.second[name][at].lerp(gradient.square(), 1 - _BETAS[1])
        mean, spread = first / (1 - _BETAS[0] ** (visit + 1)), second / (1 - _BETAS[1] ** (visit + 1))
        self.rows[name][at] = before * (1 - lr * decay) - lr * mean / (spread.sqrt() + _EPS)

    def look(self, visits: int, *, losses: int) -> None:
        """Compare the mean of the losses since the last look, of which there are so many, with the best."""
        mean = float(self.loss) / losses
        self.loss.zero_()
        if mean < self.best * (1 - _LOWER):
            self.best, self.best_visit = mean, visits


def _by_rows(size: int) -> OrderBatch:
    """Orders that are conditioned on rows, without guidance."""
    images = np.zeros(size, ORDER_DTYPE)
    images["template"], images["guidance"] = -1, 1.0
    return OrderBatch(0, 0, 0, 0, images)


def _digest_of_start(prompts: Path) -> str:
    """Hash of every class's first wording, encoded."""
    table = PromptTable.load(prompts, torch.device("cpu"), torch.float32)
    digest = hashlib.sha256()
    for name in sorted(table.embeddings):
        digest.update(name.encode() + table.embeddings[name][:, 0].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _row_bytes(prompts: Path, tokens: int, dtype: str) -> int:
    """What an image's embedding takes in the bank."""
    elements = 0
    with safe_open(prompts, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            shape = file.get_slice(name).get_shape()[2:]  # after classes and templates
            if not name.startswith(NULL):
                elements += math.prod([min(tokens, shape[0]), *shape[1:]] if name == "tokens" else shape)
    return elements * getattr(torch, dtype).itemsize


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Algorithms whose gradients do not vary from run to run; on a CPU they do not anyway."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)

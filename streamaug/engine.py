"""The engine a producer runs: an order batch becomes judged images in a ring slot.

perturb ▸ sample ▸ decode ▸ judge ▸ emit, each timed. It holds no state between batches besides weights, so a batch
is a function of its orders.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.config import Config
from streamaug.errors import ConfigError, MemoryTooSmall
from streamaug.filtering.calibration import build_judge
from streamaug.filtering.features import Features
from streamaug.filtering.judge import Judge, score_unjudged, unpack_state
from streamaug.kernels.emit import emit
from streamaug.orders import OrderBatch
from streamaug.sampling.cascade import AtSize, SecondStage, load_second_stage
from streamaug.sampling.denoisers import LoadSettings, ModelInfo, inspect, load, load_scheduler, timing
from streamaug.sampling.latents import row_conditioning, start_latents
from streamaug.sampling.residence import Residence, Rows
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.schedulers import configured, make_scheduler, setting

STAGES = ("perturb", "sample", "decode", "judge", "emit")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Engine:
    """Executes order batches with one model, one bank and one judge."""

    def __init__(
        self,
        bank: LatentBank,
        sampler: Sampler,
        judge: Judge | None,
        *,
        image_shape: tuple[int, int, int],
        latent_shape: tuple[int, int, int],
        seed: int,
        kernels: str,
        second_stage: SecondStage | None = None,
        residence: Residence = "mapped",
    ):
        self.sampler, self.judge = sampler, judge
        self.second_stage = second_stage
        self.image_shape, self.latent_shape = image_shape, latent_shape
        self.seed, self.kernels = seed, kernels
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.device = sampler.denoiser.device
        self.rows = Rows(bank, self.device, residence)

    def load_judge(self, version: int, state: np.ndarray) -> None:
        """Use these judge weights (`filtering.judge.pack_state`'s bytes) from now on."""
        assert self.judge is not None, "weights published for a stream without a judge"
        unpack_state(self.judge, state)

    @torch.no_grad()
    def make(self, order: OrderBatch, slot: Any) -> int:
        """Fill the slot with the order's accepted images, first to last; returns how many."""
        images, scores, reasons = self._judged(order, slot.beat)
        slot.beat()
        with self._timed("emit"):
            return self._emit(order, images, scores, reasons, slot)

    @torch.no_grad()
    def look(
        self, order: OrderBatch, beat: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All of an order's images, rejected ones too: uint8 [B, C, H, W], scores fp32 [B], reasons uint8 [B].

        beat: called before each evaluation of the network.
        """
        images, scores, reasons = self._judged(order, beat)
        pixels = ((images.float().nan_to_num() + 1) * 127.5).round().clamp(0, 255).byte()
        return pixels.cpu().numpy(), scores.cpu().numpy(), reasons.cpu().numpy()

    def _judged(
        self, order: OrderBatch, beat: Callable[[], None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        try:
            return self._run(order, beat)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            size = len(order)
        # Outside the handler, whose traceback holds on to the batch's tensors.
        fits = self._largest_that_fits(order, beat)
        advice = (
            f"{fits} fits: --set stream.batch_size={fits}"
            if fits
            else "not one image fits: use a smaller model or image size, or model.dtype=float16"
        )
        raise MemoryTooSmall(f"stream.batch_size {size} needs more memory than {self.device} has free; {advice}")

    def _largest_that_fits(self, order: OrderBatch, beat: Callable[[], None] | None) -> int:
        """The largest of B/2, B/4, ... orders that run, 0 if none does."""
        size = len(order) // 2
        while size:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                self._run(replace(order, images=order.images[:size].copy()), beat)
                return size
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            size //= 2
        return 0

    def _run(
        self, order: OrderBatch, beat: Callable[[], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with self._timed("perturb"):
            latents = start_latents(self.rows, order, self.latent_shape, seed=self.seed, kernels=self.kernels)
            rows = row_conditioning(self.rows, order, seed=self.seed, kernels=self.kernels)
        with self._timed("sample"):
            latents = self.sampler.sample(latents, order, rows, on_evaluation=beat)
        with self._timed("decode"):
            images = self.sampler.denoiser.decode(latents)
            if self.second_stage is not None:
                images = self.second_stage(images, order, rows, on_evaluation=beat)
        with self._timed("judge"):
            if self.judge is None:
                scores, reasons = score_unjudged(images)
            else:
                both = (torch.from_numpy(order.images[name].copy()).to(self.device) for name in ("label", "label_b"))
                scores, reasons = self.judge.score(images, *both)
        return images, scores, reasons

    def _emit(
        self, order: OrderBatch, images: torch.Tensor, scores: torch.Tensor, reasons: torch.Tensor, slot: Any
    ) -> int:
        shared = torch.from_numpy(slot.images)
        out = shared if self.device.type == "cpu" else torch.empty_like(shared, device=self.device)
        source, count = emit(images, reasons == 0, out, backend=self.kernels)
        accepted = int(count)
        if out is not shared:
            shared[:accepted].copy_(out[:accepted])
        at = source[:accepted].cpu().numpy()
        slot.reasons[:] = reasons.cpu().numpy()
        slot.source[:accepted] = at
        slot.ids[:accepted] = order.images["id"][at]
        slot.labels[:accepted] = order.images["label"][at]
        slot.scores[:accepted] = scores.cpu().numpy()[at]
        return accepted

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stage_seconds[stage] += time.perf_counter() - began


def _out_of_memory(error: RuntimeError) -> bool:
    """On a CPU torch raises a RuntimeError of its allocator."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)


def build(options: dict[str, Any]) -> Engine:
    """The engine of a prepared configuration; `options` is plain data (`Prepared.engine_options`)."""
    config = Config.model_validate(options["config"])
    device = resolve_device(config.model.device)
    dtype = _DTYPES.get(config.model.dtype) or (torch.float16 if device.type == "cuda" else torch.float32)
    model = config.model
    info = inspect(Path(options["model"]), config.data.image_size, model.variant, model.upscaler)
    info = replace(info, class_ids=options["class_ids"])
    prompts, execution = options["prompts"], options["execution"]
    denoiser = load(
        info,
        LoadSettings(
            device=device,
            dtype=dtype,
            channels_last=model.channels_last,
            compile=execution["compile"],
            null_class=info.null_class if model.null_class is None else model.null_class,
            prompts=None if prompts is None else Path(prompts),
            tiny_vae=model.tiny_vae,
            variant=model.variant,
            attention_cache=model.attention_cache,
        ),
    )
    judge = None
    if config.judge.enabled:
        features = Features(denoiser, config.judge.feature_timestep) if config.judge.features else None
        judge = build_judge(config, options["num_classes"], features).to(device).requires_grad_(False)
    seed, kernels = config.seed, config.stream.kernels
    scheduler, options_of_step, options_of_timing = solver_settings(config, info)
    sampler = Sampler(
        denoiser,
        scheduler,
        model.steps,
        seed=seed,
        kernels=kernels,
        classifier=judge if info.upscaler is None or judge is None else AtSize(judge, info.image_shape[1:]),
        guidance_interval=model.guidance_interval,
        guidance_rescale=model.guidance_rescale,
        options=options_of_step,
        timing=options_of_timing,
        graph=execution["graph"],
        debug_nan=model.debug_nan,
    )
    second_stage = None
    if info.upscaler is not None:
        second_stage = load_second_stage(
            denoiser,
            steps=model.upscaler_steps,
            noise_level=model.upscaler_noise_level,
            seed=seed,
            kernels=kernels,
            guidance_interval=model.guidance_interval,
            guidance_rescale=model.guidance_rescale,
            graph=execution["graph"],
        )
    return Engine(
        LatentBank.open(Path(options["bank"])),
        sampler,
        judge,
        image_shape=info.image_shape,
        latent_shape=info.latent_shape,
        seed=seed,
        kernels=kernels,
        second_stage=second_stage,
        residence=options["residence"],
    )


def solver_settings(config: Config, info: ModelInfo) -> tuple[Any, dict[str, Any] | None, dict[str, Any] | None]:
    """The configured scheduler, and the options of its step and of its timing. Raises ModelError.

    Where images are inverted by the sampler run backwards (bank method ddim), a clamp of its predictions is off unless
    the configuration asks for it: nothing can invert it.
    """
    model = config.model
    scheduler = make_scheduler(load_scheduler(info.path), model.scheduler)
    overrides = dict(model.scheduler_config)
    if "ddim" in config.bank.methods and setting(scheduler, "clip_sample"):
        overrides.setdefault("clip_sample", False)
    scheduler = configured(scheduler, overrides)
    options = None if model.eta is None else {"eta": model.eta}
    return scheduler, options, timing(info, scheduler, model.steps)


def resolve_device(name: str) -> torch.device:
    """The device that model.device means on this machine. Raises ConfigError when it is not there."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    there = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name not in there:
        found = "" if gpus or not name.startswith("cuda") else ": torch finds no usable GPU (see `streamaug doctor`)"
        raise ConfigError(f"model.device is '{name}'{found}; accepted on this machine: auto, {', '.join(there)}")
    return torch.device(name)

"""The engine a producer runs: an order batch becomes judged images in a ring slot.

perturb ▸ sample ▸ decode ▸ judge ▸ emit, each timed. Of latents, as many images are decoded, judged and written to the
slot at a time as memory is bounded by. It holds no state between batches besides weights, so a batch is a function of
its orders.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from streamaug.bank import LatentBank
from streamaug.config import Config, ModelConfig
from streamaug.errors import ConfigError, MemoryTooSmall, ModelError
from streamaug.filtering.calibration import build_judge
from streamaug.filtering.features import Features
from streamaug.filtering.judge import Judge, score_unjudged, unpack_state
from streamaug.kernels.emit import emit
from streamaug.orders import ORDER_DTYPE, OrderBatch
from streamaug.sampling.cascade import AtSize, SecondStage, load_second_stage
from streamaug.sampling.denoisers import LoadSettings, ModelInfo, inspect, load, load_scheduler, step_options, timing
from streamaug.sampling.latents import row_conditioning, start_latents
from streamaug.sampling.memory import (
    Enough,
    after_one_evaluation,
    estimate,
    free_on_gpu,
    largest,
    measurable,
    peak_bytes,
)
from streamaug.sampling.residence import Residence, Rows
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.schedulers import configured, make_scheduler, setting
from streamaug.stream.ring.memory import available, human

if TYPE_CHECKING:
    from streamaug.stream.ring.emission import Emission

log = logging.getLogger("streamaug")

STAGES = ("perturb", "sample", "decode", "judge", "emit")
# What `build` imports late, for producers that are copies of a process that has it already.
PRELOAD = (
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders",
    "diffusers.schedulers.scheduling_ddim",
)
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
        kinds: Sequence[OrderBatch] = (),
    ):
        """kinds: an order batch of each kind that there will be (`kinds_of`), to be measured and prepared for."""
        self.sampler, self.judge = sampler, judge
        self.second_stage = second_stage
        self.image_shape, self.latent_shape = image_shape, latent_shape
        self.seed, self.kernels = seed, kernels
        self.kinds = tuple(kinds)
        self._warm = False
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        self.device = sampler.denoiser.device
        self.rows = Rows(bank, self.device, residence)

    def load_judge(self, version: int, state: np.ndarray) -> None:
        """Use these judge weights (`filtering.judge.pack_state`'s bytes) from now on."""
        assert self.judge is not None, "weights published for a stream without a judge"
        unpack_state(self.judge, state)

    @torch.no_grad()
    def make(self, order: OrderBatch, slot: Any) -> "int | Emission":
        """Fill the slot with the order's accepted images, first to last; returns how many.

        On a GPU, returns what is on its way to the slot instead, and waits for nothing. The first batch waits for
        compiling and capturing what all kinds of batches need.
        """
        if self.device.type == "cuda":
            return self._emission(order, list(self._judged(order, slot.beat)), slot)
        count = 0
        for part in self._judged(order, slot.beat):
            slot.beat()
            with self._timed("emit"):
                count += self._emit(order, part, slot, count)
        return count

    @torch.no_grad()
    def look(
        self, order: OrderBatch, beat: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All of an order's images, rejected ones too: uint8 [B, C, H, W], scores fp32 [B], reasons uint8 [B].

        beat: called before each evaluation of the network.
        """
        parts = [
            (_bytes(part.images).cpu().numpy(), part.scores.cpu().numpy(), part.reasons.cpu().numpy())
            for part in self._judged(order, beat)
        ]
        pixels, scores, reasons = (np.concatenate(each) for each in zip(*parts, strict=True))
        return pixels, scores, reasons

    @torch.no_grad()
    def check_memory(self, free: int, producers: int = 1) -> None:
        """Refuse a batch that cannot fit before any is made, by what an eighth and a quarter of one take.

        free: bytes there are on the device, which so many producers share. Raises MemoryTooSmall.
        """
        if not self.kinds:
            return
        size = len(self.kinds[0])
        together = min(size, self.sampler.denoiser.decoded_at_once or size)
        try:
            stages = [(size, estimate(partial(self._peak, self._rehearse, kind), size)) for kind in self.kinds]
            stages.append((together, estimate(partial(self._peak, self._rehearse_decoding, self.kinds[0]), together)))
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            stages = []
        finally:
            self._give_back()
        if not stages:
            fits = self._largest_that_runs(size // 4, partial(self._peak, self._rehearse, self.kinds[0]))
            raise self._too_small(size, fits)

        def needed(n: int) -> float:
            return max(stage.bytes(min(n, most)) for most, stage in stages)

        log.info("a batch of %d takes about %s of memory, %s are free", size, human(int(needed(size))), human(free))
        if needed(size) * producers > free:
            each = f" in each of {producers} producers" if producers > 1 else ""
            takes = f"takes about {human(int(needed(size)))}{each}, and {human(free)} are free on {self.device}"
            raise self._too_small(size, largest(needed, free // producers, size), takes)

    def _peak(self, rehearse: Callable[[OrderBatch], None], order: OrderBatch, n: int) -> int:
        """Bytes that n of the order's images take at most."""
        with self.sampler.aside():
            return peak_bytes(partial(rehearse, _first(order, n)), self.device)

    def _rehearse(self, order: OrderBatch) -> None:
        """One evaluation of the network, and of the second stage's."""
        latents, rows = self._started(order)
        with suppress(Enough):
            self.sampler.sample(latents, order, rows, on_evaluation=after_one_evaluation())
        if self.second_stage is not None:
            with self.second_stage.sampler.aside(), suppress(Enough):
                self.second_stage(latents, order, rows, on_evaluation=after_one_evaluation())

    def _rehearse_decoding(self, order: OrderBatch) -> None:
        images = self.sampler.denoiser.decode(torch.zeros((len(order), *self.latent_shape), device=self.device))
        if self.second_stage is not None:
            images = images.new_zeros((len(order), *self.image_shape))
        self._scored(order.images, images)

    def _warm_up(self, beat: Callable[[], None] | None) -> None:
        """Compile and capture, before the first batch, what all kinds of batches need."""
        if self._warm or not self.sampler.prepares:
            return
        self._warm = True
        for position, kind in enumerate(self.kinds):
            began = time.monotonic()
            latents, rows = self._started(kind)
            self.sampler.warm_up(latents, kind, rows, on_evaluation=beat)
            if self.second_stage is not None:
                self.second_stage.warm_up(latents, kind, rows, on_evaluation=beat)
            log.info(
                "kind %d of %d of batches ready in %.1f s", position + 1, len(self.kinds), time.monotonic() - began
            )

    def _give_back(self) -> None:
        """What torch keeps of freed memory, to whoever shares the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _judged(self, order: OrderBatch, beat: Callable[[], None] | None = None) -> Iterator["_Part"]:
        """The order's images, judged, in parts that are decoded at a time. Raises MemoryTooSmall."""
        try:
            yield from self._run(order, beat)
            return
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Outside the handler, whose traceback holds on to the batch's tensors.
        fits = self._largest_that_runs(len(order) // 2, lambda n: list(self._run(_first(order, n), beat)))
        raise self._too_small(len(order), fits)

    def _too_small(self, size: int, fits: int, takes: str | None = None) -> MemoryTooSmall:
        takes = takes or f"needs more memory than {self.device} has free"
        advice = (
            f"{fits} fits: --set stream.batch_size={fits}"
            if fits
            else "not one image fits: use a smaller model or image size, or model.dtype=float16"
        )
        return MemoryTooSmall(f"stream.batch_size {size} {takes}; {advice}")

    def _largest_that_runs(self, size: int, run: Callable[[int], object]) -> int:
        """The largest of size, size/2, size/4, ... for which `run` finds memory, 0 if none does."""
        while size:
            self._give_back()
            try:
                run(size)
                return size
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
            size //= 2
        return 0

    def _run(self, order: OrderBatch, beat: Callable[[], None] | None) -> Iterator["_Part"]:
        self._warm_up(beat)
        with self._timed("perturb"):
            latents, rows = self._started(order)
        with self._timed("sample"):
            latents = self.sampler.sample(latents, order, rows, on_evaluation=beat)
        decoded, at = self.sampler.denoiser.decoded(latents), 0
        while at < len(order):
            with self._timed("decode"):
                images = next(decoded)
                if self.second_stage is not None:
                    images = self.second_stage(images, order, rows, on_evaluation=beat)
            with self._timed("judge"):
                scores, reasons = self._scored(order.images[at : at + len(images)], images)
            yield _Part(at, images, scores, reasons)
            at += len(images)

    def _started(self, order: OrderBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Where the order's images enter the schedule, and their rows for the conditioning."""
        latents = start_latents(self.rows, order, self.latent_shape, seed=self.seed, kernels=self.kernels)
        return latents, row_conditioning(self.rows, order, seed=self.seed, kernels=self.kernels)

    def _scored(self, orders: np.ndarray, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.judge is None:
            return score_unjudged(images)
        both = (torch.from_numpy(orders[name].copy()).to(self.device) for name in ("label", "label_b"))
        return self.judge.score(images, *both)

    def _emit(self, order: OrderBatch, part: "_Part", slot: Any, at: int) -> int:
        """Write a part's accepted images behind the `at` that the slot has; returns how many."""
        size = len(part.images)
        out = torch.from_numpy(slot.images[at : at + size])
        source, count = emit(part.images, part.reasons == 0, out, backend=self.kernels)
        accepted = int(count)
        found, to = source[:accepted].numpy(), slice(at, at + accepted)
        slot.reasons[part.at : part.at + size] = part.reasons.numpy()
        slot.source[to] = part.at + found
        slot.ids[to] = order.images["id"][part.at + found]
        slot.labels[to] = order.images["label"][part.at + found]
        slot.scores[to] = part.scores.numpy()[found]
        return accepted

    def _emission(self, order: OrderBatch, parts: Sequence["_Part"], slot: Any) -> "Emission":
        """All parts in one: where one part's images end is known to the device alone."""
        from streamaug.stream.ring.emission import Emission

        whole = parts[0]
        if len(parts) > 1:
            together = ([getattr(part, name) for part in parts] for name in ("images", "scores", "reasons"))
            whole = _Part(0, *(torch.cat(each) for each in together))
        with self._timed("emit"):
            out = slot.images  # in the GPU's memory, or the host's
            if not isinstance(out, torch.Tensor) or out.device != whole.images.device:
                out = torch.empty(whole.images.shape, dtype=torch.uint8, device=whole.images.device)
            source, count = emit(whole.images, whole.reasons == 0, out, backend=self.kernels)
            return Emission(order, slot, out, source=source, count=count, reasons=whole.reasons, scores=whole.scores)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.stage_seconds[stage] += time.perf_counter() - began


@dataclass(frozen=True)
class _Part:
    """Images that were decoded together: at: of the first, in the batch; images [n, C, H, W]; the judge's verdicts."""

    at: int
    images: torch.Tensor
    scores: torch.Tensor
    reasons: torch.Tensor


def _first(order: OrderBatch, n: int) -> OrderBatch:
    return replace(order, images=order.images[:n].copy())


def _bytes(images: torch.Tensor) -> torch.Tensor:
    """[n, C, H, W] in [-1, 1] to uint8, as `emit` rounds; what is not finite becomes something."""
    return images.float().nan_to_num().add_(1).mul_(127.5).round_().clamp_(0, 255).byte()


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
    settings = load_settings(config, info, device, dtype, None if prompts is None else Path(prompts))
    denoiser = load(info, replace(settings, compile=execution["compile"], attention_cache=model.attention_cache))
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
    engine = Engine(
        LatentBank.open(Path(options["bank"])),
        sampler,
        judge,
        image_shape=info.image_shape,
        latent_shape=info.latent_shape,
        seed=seed,
        kernels=kernels,
        second_stage=second_stage,
        residence=options["residence"],
        kinds=kinds_of(config, denoiser.guidance),
    )
    if measurable(device):
        free = free_on_gpu(device) if device.type == "cuda" else available("memfd")
        together = -(-config.stream.producers // max(len(config.stream.devices), 1))  # producers on one device
        engine.check_memory(free, together)
    return engine


def kinds_of(config: Config, guidance: str) -> list[OrderBatch]:
    """A batch from pure noise of every kind that the recipes come to: guided or not, by prompts or by bank rows.

    guidance: the model's, as in ModelInfo. The guided ones, which take the most memory, come first.
    """
    kinds = set()
    for recipe in config.recipes:
        guided = guidance == "cfg" and recipe.guidance[1] > 1
        if recipe.weight > 0:
            kinds.add((guided, recipe.by_embedding, recipe.classifier_guidance[1]))
            if guided and config.model.guidance_interval != (0.0, 1.0):
                kinds.add((False, recipe.by_embedding, recipe.classifier_guidance[1]))
    made = []
    for guided, by_embedding, classifier_guidance in sorted(kinds, reverse=True):
        images = np.zeros(config.stream.batch_size, ORDER_DTYPE)
        images["id"] = np.arange(len(images))
        images["row_a"], images["row_b"] = 0 if by_embedding else -1, -1
        images["template"] = -1 if by_embedding else 0
        images["latent_w"], images["cond_w"] = (0, 0, 1), (1, 0, 0)
        images["guidance"], images["classifier_guidance"] = 2.0 if guided else 1.0, classifier_guidance
        made.append(OrderBatch(0, 0, 0, 0, images))
    return made


def load_settings(
    config: Config,
    info: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    prompts: Path | None,
    *,
    decodes: bool = True,
) -> LoadSettings:
    """How the configuration has the model run, exactly and uncompiled.

    prompts: the file of encoded prompts; decodes: whether images are made of latents.
    """
    model = config.model
    return LoadSettings(
        device=device,
        dtype=dtype,
        channels_last=model.channels_last,
        null_class=info.null_class if model.null_class is None else model.null_class,
        prompts=prompts,
        tiny_vae=model.tiny_vae if decodes else None,
        variant=model.variant,
        embedded_guidance=model.embedded_guidance,
        original_size=model.original_size,
        target_size=model.target_size,
    )


def told_besides(model: ModelConfig) -> dict[str, Any]:
    """The settings, where given, of what a network is told besides class, prompt and timestep."""
    return model.model_dump(include={"embedded_guidance", "original_size", "target_size"}, exclude_none=True)


def solver_settings(config: Config, info: ModelInfo) -> tuple[Any, dict[str, Any] | None, dict[str, Any] | None]:
    """The configured scheduler, and the options of its step and of its timing.

    Raises ModelError, also for a setting of the model that it does not take.

    Where images are inverted by the sampler run backwards (bank method ddim), a clamp of its predictions is off unless
    the configuration asks for it: nothing can invert it.
    """
    model = config.model
    if model.embedded_guidance is not None and info.guidance != "embedded":
        raise ModelError(
            f"model.embedded_guidance: {info.path} takes no scale as an input; set it to null, and the scale in the "
            "recipes' guidance"
        )
    scheduler = make_scheduler(load_scheduler(info.path), model.scheduler)
    overrides = dict(model.scheduler_config)
    if "ddim" in config.bank.methods and setting(scheduler, "clip_sample"):
        overrides.setdefault("clip_sample", False)
    scheduler = configured(scheduler, overrides)
    options = step_options(info, scheduler) if model.eta is None else {"eta": model.eta}
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

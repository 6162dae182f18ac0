"""Cascade: the second stage enlarges the first one's images and samples what they lack; between decode and judge."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from streamaug.errors import ModelError
from streamaug.kernels.perturb import perturb
from streamaug.kernels.philox import normal
from streamaug.orders import OrderBatch
from streamaug.sampling.denoisers import Denoiser, ModelInfo, Rows, load_scheduler
from streamaug.sampling.denoisers.base import saved_scheduler
from streamaug.sampling.denoisers.deepfloyd_if import NOISING, UPSCALED, Base, SuperResolution, load_upscaler
from streamaug.sampling.sampler import Sampler
from streamaug.sampling.solvers.table import schedule_of, solver_for

# Philox streams of the second stage; those of the first are in `latents` and `sampler`.
NOISING_STREAM = 2
START_STREAM = 3
SOLVER_STREAM = 4


class SecondStage:
    """Runs a super-resolution model over the first stage's images, whole schedule, with the orders' guidance.

    sampler: over a `deepfloyd_if.SuperResolution`, with a scheduler of its own and SOLVER_STREAM; scales: signal and
    noise of the enlarged image at the denoiser's noise level (`noised_scales`). All noise is keyed by image id.
    """

    def __init__(self, sampler: Sampler, scales: tuple[float, float]):
        assert isinstance(sampler.denoiser, SuperResolution) and sampler.denoiser.info is not None
        self.sampler = sampler
        self.shape = sampler.denoiser.info.image_shape
        self._weights = torch.tensor([scales[0], 0.0, scales[1]], device=sampler.denoiser.device)

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        order: OrderBatch,
        rows: Rows | None = None,
        on_evaluation: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The first stage's images [B, C, h, w] in [-1, 1] to images [B, C, H, W] fp32 in [-1, 1].

        rows, on_evaluation: as for `Sampler.sample`. Classifier guidance acts in the first stage, which decides what
        is seen, and not here.
        """
        return self.sampler.sample(*self._given(images, order, rows), on_evaluation=on_evaluation)

    @torch.no_grad()
    def warm_up(
        self,
        images: torch.Tensor,
        order: OrderBatch,
        rows: Rows | None = None,
        on_evaluation: Callable[[], None] | None = None,
    ) -> None:
        """`Sampler.warm_up` for such a batch."""
        self.sampler.warm_up(*self._given(images, order, rows), on_evaluation=on_evaluation)

    def _given(
        self, images: torch.Tensor, order: OrderBatch, rows: Rows | None
    ) -> tuple[torch.Tensor, OrderBatch, Rows]:
        """What the second stage starts from: noise, its orders and its rows."""
        ids = torch.from_numpy(order.images["id"].copy()).to(images.device)
        latents = self.sampler.schedule.initial_noise * self._normal(ids)
        second = replace(order, start=0, images=order.images.copy())
        second.images["classifier_guidance"] = 0.0
        return latents, second, {**(rows or {}), UPSCALED: self._upscaled(images, ids)}

    def _normal(self, ids: torch.Tensor) -> torch.Tensor:
        sampler = self.sampler
        return normal(ids, self.shape, seed=sampler.seed, stream=START_STREAM, backend=sampler.kernels)

    def _upscaled(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The images enlarged, bilinearly and corner on corner, and noised: fp32 [B, C, H, W]."""
        enlarged = F.interpolate(images.float(), self.shape[1:], mode="bilinear", align_corners=True)
        return perturb(
            enlarged.contiguous(),
            torch.arange(len(ids), device=ids.device),
            torch.full_like(ids, -1),
            self._weights.expand(len(ids), 3).contiguous(),
            ids,
            seed=self.sampler.seed,
            stream=NOISING_STREAM,
            backend=self.sampler.kernels,
        )


def load_second_stage(
    base: Denoiser,
    *,
    steps: int,
    noise_level: int,
    seed: int,
    kernels: str,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    graph: bool = False,
) -> SecondStage:
    """The second stage of the base model's cascade (`info.upscaler`), with its folder's own scheduler.

    noise_level: the training timestep to which the enlarged images are noised; the others: as for `Sampler`. Raises
    ModelError.
    """
    assert isinstance(base, Base) and base.info is not None and base.info.upscaler is not None
    path = base.info.upscaler.path
    sampler = Sampler(
        load_upscaler(base, noise_level),
        load_scheduler(path),
        steps,
        seed=seed,
        kernels=kernels,
        guidance_interval=guidance_interval,
        guidance_rescale=guidance_rescale,
        stream=SOLVER_STREAM,
        graph=graph,
    )
    return SecondStage(sampler, noised_scales(path, noise_level))


def check(upscaler: ModelInfo, steps: int, noise_level: int) -> None:
    """Raises ModelError when the second stage cannot run so many steps, or not at that noise level."""
    noised_scales(upscaler.path, noise_level)
    scheduler = load_scheduler(upscaler.path)
    schedule_of(scheduler, steps)
    solver_for(scheduler, steps)


def noised_scales(path: Path, noise_level: int) -> tuple[float, float]:
    """Signal and noise of an enlarged image at a noise level, by the folder's image_noising_scheduler.

    Raises ModelError for a level that the schedule does not have.
    """
    scheduler = saved_scheduler(path, NOISING)
    trained = int(scheduler.config.num_train_timesteps)
    if not 0 <= noise_level < trained:
        raise ModelError(
            f"model.upscaler_noise_level is {noise_level}; {path} takes 0 to {trained - 1}, and 250 is usual"
        )
    one, zero, level = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.tensor([noise_level])
    return float(scheduler.add_noise(one, zero, level)), float(scheduler.add_noise(zero, one, level))


class AtSize(nn.Module):
    """A classifier that is shown smaller images than it takes, enlarged: the first stage's, for its guidance."""

    def __init__(self, classifier: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.classifier, self.size = classifier, size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes] for images [B, C, h, w] in [-1, 1]."""
        return self.classifier(F.interpolate(images, self.size, mode="bilinear", align_corners=True))

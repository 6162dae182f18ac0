"""Sampler: an order batch and its starting latents become clean latents. This is the loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from streamaug.errors import ModelError, UsageError
from streamaug.kernels.step import HISTORY, Column, Columns, step, used_columns
from streamaug.orders import OrderBatch, Schedule
from streamaug.sampling.denoisers.base import Conditioning, Denoiser, Rows, conditional_half
from streamaug.sampling.guidance import classifier_shift, combine, rescaled
from streamaug.sampling.solver import SolverTable, schedule_of, solver_table

_STEP_STREAM = 1  # the noise stream of the solver; stream 0 is the starting latent's


class Sampler:
    """Runs the solver of a diffusers scheduler over a denoiser, from any solver step to the end.

    denoiser: an adapter of `sampling.denoisers`; scheduler: a diffusers scheduler object; classifier: called on
    images [B, C, H, W] in [-1, 1], needed only for orders with classifier guidance. guidance_interval: the share of
    the schedule, 0 at pure noise and 1 at the clean image, in which classifier-free guidance acts (Kynkäänniemi et
    al. 2024); guidance_rescale: φ of Lin et al. 2023, section 3.4, in [0, 1].
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        steps: int,
        *,
        seed: int = 0,
        kernels: str = "auto",
        classifier: nn.Module | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
    ):
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.steps = steps
        self.seed = seed
        self.kernels = kernels
        self.classifier = classifier
        self.guidance_interval = guidance_interval
        self.guidance_rescale = guidance_rescale
        self.schedule: Schedule = schedule_of(scheduler, steps)
        self._tables: dict[int, SolverTable] = {}
        self._coefs: dict[tuple[int, int], tuple[torch.Tensor, Columns]] = {}

    def table(self, start: int) -> SolverTable:
        if start not in self._tables:
            self._tables[start] = solver_table(self.scheduler, self.steps, start)
        return self._tables[start]

    @torch.no_grad()
    def sample(
        self,
        latents: torch.Tensor,
        order: OrderBatch,
        rows: Rows | None = None,
        on_evaluation: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Latents [B, c, h, w] that enter at `order.start` -> clean latents [B, c, h, w] fp32.

        rows: the order's mixed bank rows for the conditioning, if any. `on_evaluation` is called before each
        evaluation of the network.
        """
        device, dtype = self.denoiser.device, self.denoiser.dtype
        table = self.table(order.start)
        images = order.images
        size = len(order)
        doubled = self._doubled(images, table)  # which evaluations need the unconditional half
        conditioning = self._conditionings(order, rows or {}, doubled)
        ids = torch.from_numpy(images["id"].copy()).to(device)

        coef, columns = self._coefficients(table, size)
        guidance = torch.from_numpy(images["guidance"].copy()).to(device)
        coef[:, :, Column.GUIDANCE] = guidance
        index = torch.zeros(1, dtype=torch.int64, device=device)

        x = latents.to(device, torch.float32, copy=True).contiguous()
        history = torch.zeros((HISTORY, *x.shape), device=device)
        first = (x * table.in_first).to(dtype)
        inputs = {halves: first.repeat(halves, 1, 1, 1) for halves in {1 + twice for twice in doubled}}
        timesteps = torch.from_numpy(table.timesteps).to(device, torch.float32)
        towards = self._classifier_inputs(images, device)

        for evaluation in range(len(table)):
            if on_evaluation:
                on_evaluation()
            guided = doubled[evaluation]
            # Predict.
            out = self.denoiser(inputs[1 + guided], timesteps[evaluation], conditioning[guided])
            if self.denoiser.learned_variance:
                out = out[:, : x.shape[1]].contiguous()
            # Guide by the classifier: shift the predicted clean image, written as a change of the model's output.
            if towards is not None:
                out = self._towards_label(out, x, coef[evaluation], table, evaluation, *towards, guided=guided)
            if guided and self.guidance_rescale:
                out, guided = rescaled(out, guidance, self.guidance_rescale), False
            # Combine the guidance halves and move to the next noise level.
            after = doubled[min(evaluation + 1, len(table) - 1)]
            step(
                x,
                out,
                coef,
                index,
                history,
                inputs[1 + after],
                ids,
                seed=self.seed,
                stream=_STEP_STREAM,
                guided=guided,
                clip=table.clip,
                noisy=Column.CN in columns,
                columns=columns,
                backend=self.kernels,
            )
            index += 1
        return x

    def _coefficients(self, table: SolverTable, size: int) -> tuple[torch.Tensor, Columns]:
        """The table on the device, fp32 [E, B, len(Column)], kept: only its guidance column changes by batch."""
        key = table.start, size
        if key not in self._coefs:
            rows = torch.from_numpy(table.coef).to(self.denoiser.device, torch.float32)
            coef = rows[:, None, :].repeat(1, size, 1)
            self._coefs[key] = coef, used_columns(coef)
        return self._coefs[key]

    def _doubled(self, images: np.ndarray, table: SolverTable) -> list[bool]:
        """Which evaluations run with the unconditional half: those in the interval, none when every scale is 1."""
        evaluations = len(table)
        if self.denoiser.guidance == "embedded" or (images["guidance"] == 1.0).all():
            return [False] * evaluations
        if self.denoiser.guidance == "none":
            raise ModelError(
                "classifier-free guidance needs a class-conditional model; set every recipe's guidance to 1"
            )
        low, high = self.guidance_interval
        position = (table.start + np.arange(evaluations) * (self.steps - table.start) / evaluations) / self.steps
        return ((low <= position) & (position < high)).tolist()

    def _conditionings(self, order: OrderBatch, rows: Rows, doubled: list[bool]) -> dict[bool, Conditioning]:
        """The conditioning of guided (True) and of unguided (False) evaluations, those that occur."""
        if not any(doubled):
            return {False: self.denoiser.condition(order, rows, False)}
        both = self.denoiser.condition(order, rows, True)
        return {True: both, False: conditional_half(both)}

    def _classifier_inputs(self, images: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        if (images["classifier_guidance"] == 0.0).all():
            return None
        if self.classifier is None:
            raise UsageError("classifier guidance needs a judge: set judge.enabled, or classifier_guidance to [0, 0]")
        labels = torch.from_numpy(images["label"].copy()).to(device)
        return labels, torch.from_numpy(images["classifier_guidance"].copy()).to(device)

    def _towards_label(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        coef: torch.Tensor,
        table: SolverTable,
        evaluation: int,
        labels: torch.Tensor,
        scale: torch.Tensor,
        *,
        guided: bool,
    ) -> torch.Tensor:
        a, s, guidance = (coef[:, column].view(-1, 1, 1, 1) for column in (Column.A, Column.S, Column.GUIDANCE))
        e = combine(out.float(), guidance) if guided else out.float()
        m0 = a * x + s * e
        if table.clip is not None:
            m0 = m0.clamp(-table.clip, table.clip)
        assert self.classifier is not None
        shift = classifier_shift(self.classifier, m0, labels, scale, float(table.x0_scale[evaluation]))
        # Both halves move alike, so that the guidance combination moves by exactly this much.
        change = (shift / s).to(out.dtype)
        return out + (torch.cat([change, change]) if guided else change)

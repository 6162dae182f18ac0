"""Sampler: an order batch and its starting latents become clean latents. This is the loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from streamaug.errors import ModelError, UsageError
from streamaug.kernels.step import HISTORY, Column, Columns, step, used_columns
from streamaug.orders import OrderBatch, Schedule
from streamaug.sampling.guidance import classifier_shift
from streamaug.sampling.solver import SolverTable, schedule_of, solver_table

_STEP_STREAM = 1  # the noise stream of the solver; stream 0 is the starting latent's


class Sampler:
    """Runs the solver table of a diffusers scheduler over a denoiser, from any solver step to the end.

    denoiser: an adapter of `sampling.denoisers`; scheduler: a diffusers scheduler object; classifier: called on
    images [B, C, H, W] in [-1, 1], needed only for orders with classifier guidance.
    """

    def __init__(
        self,
        denoiser: Any,
        scheduler: Any,
        steps: int,
        *,
        seed: int = 0,
        kernels: str = "auto",
        classifier: nn.Module | None = None,
    ):
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.steps = steps
        self.seed = seed
        self.kernels = kernels
        self.classifier = classifier
        self.schedule: Schedule = schedule_of(scheduler, steps)
        self._tables: dict[int, SolverTable] = {}
        self._coefs: dict[tuple[int, int], tuple[torch.Tensor, Columns]] = {}

    def table(self, start: int) -> SolverTable:
        if start not in self._tables:
            self._tables[start] = solver_table(self.scheduler, self.steps, start)
        return self._tables[start]

    @torch.no_grad()
    def sample(
        self, latents: torch.Tensor, order: OrderBatch, on_evaluation: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Latents [B, C, h, w] that enter at `order.start` -> clean latents [B, C, h, w] fp32.

        `on_evaluation` is called before each evaluation of the network.
        """
        device, dtype = self.denoiser.device, self.denoiser.dtype
        table = self.table(order.start)
        images = order.images
        size = len(order)
        guided = self._guided(images)
        conditioning = self.denoiser.conditioning(images["label"], guided)
        ids = torch.from_numpy(images["id"].copy()).to(device)

        coef, columns = self._coefficients(table, size)
        coef[:, :, Column.GUIDANCE] = torch.from_numpy(images["guidance"].copy()).to(device)
        index = torch.zeros(1, dtype=torch.int64, device=device)

        x = latents.to(device, torch.float32, copy=True).contiguous()
        history = torch.zeros((HISTORY, *x.shape), device=device)
        halves = 2 if guided else 1
        net_in = (x * table.in_first).to(dtype).repeat(halves, 1, 1, 1)
        timesteps = torch.from_numpy(table.timesteps).to(device)
        towards = self._classifier_inputs(images, device)

        for evaluation in range(len(table)):
            if on_evaluation:
                on_evaluation()
            # Predict.
            out = self.denoiser(net_in, timesteps[evaluation], conditioning)
            # Guide by the classifier: shift the predicted clean image, written as a change of the model's output.
            if towards is not None:
                out = self._towards_label(out, x, coef[evaluation], table, evaluation, *towards, guided=guided)
            # Combine the guidance halves and move to the next noise level.
            step(
                x,
                out,
                coef,
                index,
                history,
                net_in,
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

    def _guided(self, images: np.ndarray) -> bool:
        """Whether any image needs the unconditional half; a batch in which every scale is 1 costs half."""
        if (images["guidance"] == 1.0).all():
            return False
        if not self.denoiser.conditional:
            raise ModelError(
                "classifier-free guidance needs a class-conditional model; set every recipe's guidance to 1"
            )
        return True

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
        halves = out.float().chunk(2) if guided else (out.float(),)
        e = torch.lerp(halves[0], halves[1], guidance) if guided else halves[0]
        m0 = a * x + s * e
        if table.clip is not None:
            m0 = m0.clamp(-table.clip, table.clip)
        assert self.classifier is not None
        shift = classifier_shift(self.classifier, m0, labels, scale, float(table.x0_scale[evaluation]))
        # Both halves move alike, so that the guidance combination moves by exactly this much.
        change = (shift / s).to(out.dtype)
        return out + (torch.cat([change, change]) if guided else change)

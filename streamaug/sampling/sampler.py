"""Sampler: an order batch and its starting latents become clean latents. This is the loop."""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from streamaug.errors import ModelError, UsageError
from streamaug.kernels.rescale import rescale
from streamaug.kernels.step import HISTORY, Column, Columns, step, used_columns
from streamaug.orders import OrderBatch, Schedule
from streamaug.sampling.denoisers.base import Conditioning, Denoiser, Rows, conditional_half
from streamaug.sampling.graph import Graphs
from streamaug.sampling.guidance import classifier_shift, combine
from streamaug.sampling.network import uncompiled
from streamaug.sampling.solvers.stepped import SteppedSolver
from streamaug.sampling.solvers.table import SolverTable, schedule_of, solver_for

_log = logging.getLogger("streamaug")

_STEP_STREAM = 1  # the noise stream of the solver; stream 0 is the starting latent's


class Sampler:
    """Runs the solver of a diffusers scheduler over a denoiser, from any solver step to the end.

    denoiser: an adapter of `sampling.denoisers`; scheduler: a diffusers scheduler object; classifier: called on
    images [B, C, H, W] in [-1, 1], needed only for orders with classifier guidance. guidance_interval: the share of
    the schedule, 0 at pure noise and 1 at the clean image, in which classifier-free guidance acts (Kynkäänniemi et
    al. 2024); guidance_rescale: φ of Lin et al. 2023, section 3.4, in [0, 1]. stream: of the solver's noise; options,
    timing: keyword arguments of `scheduler.step`, such as eta, and of `scheduler.set_timesteps` (`denoisers.timing`);
    graph: replay the evaluations as CUDA graphs (not measured on a GPU yet); debug_nan: log the evaluation in which
    an image first stops being finite, which waits for the device.
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
        stream: int = _STEP_STREAM,
        options: dict[str, Any] | None = None,
        timing: dict[str, Any] | None = None,
        graph: bool = False,
        debug_nan: bool = False,
    ):
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.steps = steps
        self.seed = seed
        self.kernels = kernels
        self.classifier = classifier
        self.guidance_interval = guidance_interval
        self.guidance_rescale = guidance_rescale
        self.stream = stream
        self.options, self.timing = options, timing
        self.schedule: Schedule = schedule_of(scheduler, steps, options=options, timing=timing)
        self.graphs = Graphs() if graph else None
        self.debug_nan = debug_nan
        self._solvers: dict[int, SolverTable | SteppedSolver] = {}
        self._loops: dict[Hashable, _Loop] = {}

    def solver(self, start: int) -> SolverTable | SteppedSolver:
        """The evaluations of images that enter at solver step `start`."""
        if start not in self._solvers:
            options, timing = self.options, self.timing
            self._solvers[start] = solver_for(self.scheduler, self.steps, start, options=options, timing=timing)
        return self._solvers[start]

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
        evaluation of the network, of which a GPU has at most two waiting. Its buffers are kept between batches: one
        batch at a time.
        """
        solver = self.solver(order.start)
        images = _at_least_unguided(order.images)
        doubled = self._doubled(images, solver)  # which evaluations need the unconditional half
        conditioning = self._conditionings(order, rows or {}, doubled)
        towards = self._classifier_inputs(images, solver)
        watch = _Watch(images["id"], solver.timesteps) if self.debug_nan else None
        if on_evaluation and self.denoiser.device.type == "cuda":
            on_evaluation = _Paced(on_evaluation)
        if isinstance(solver, SteppedSolver):
            return self._stepped(solver, latents, images, doubled, conditioning, towards, watch, on_evaluation)
        loop = self._loop(latents.shape, doubled, conditioning)
        loop.begin(latents, images, solver, conditioning)

        for evaluation, (guided, after) in enumerate(_with_next(doubled)):
            if on_evaluation:
                on_evaluation()
            if evaluation == 0 or guided != doubled[evaluation - 1]:
                self.denoiser.forget()
            if towards is not None:
                loop.advance(guided, after, partial(self._towards_label, solver, loop, evaluation, *towards))
            elif self.graphs is not None:
                self._replay(loop, guided, after)
            else:
                loop.advance(guided, after)
            if watch is not None:
                watch(evaluation, loop.x)
        return loop.x.clone()

    @torch.no_grad()
    def warm_up(
        self,
        latents: torch.Tensor,
        order: OrderBatch,
        rows: Rows | None = None,
        on_evaluation: Callable[[], None] | None = None,
    ) -> None:
        """Compile and capture all that such a batch needs, by one evaluation of each kind. Arguments as of `sample`.

        A later capture could meet a trainer on the same GPU that draws random numbers, which torch does not allow.
        """
        solver, images = self.solver(order.start), _at_least_unguided(order.images)
        doubled = self._doubled(images, solver)
        conditioning = self._conditionings(order, rows or {}, doubled)
        if isinstance(solver, SteppedSolver):
            for guided in dict.fromkeys(doubled):
                if on_evaluation:
                    on_evaluation()
                given = latents.to(self.denoiser.device, self.denoiser.dtype).repeat(1 + guided, 1, 1, 1)
                timestep = torch.tensor(solver.timesteps[0], dtype=torch.float32, device=given.device)
                self.denoiser(given, timestep, conditioning[guided])
            return
        loop = self._loop(latents.shape, doubled, conditioning)
        loop.begin(latents, images, solver, conditioning)
        for guided, after in dict.fromkeys(_with_next(doubled)):
            if on_evaluation:
                on_evaluation()
            if self.graphs is not None and (images["classifier_guidance"] == 0.0).all():
                self._replay(loop, guided, after)
            else:
                loop.advance(guided, after)

    @property
    def prepares(self) -> bool:
        """Whether `warm_up` has something to do."""
        return self.denoiser.settings.compile or (self.graphs is not None and self.denoiser.device.type == "cuda")

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it, for a look at what a batch takes, nothing is compiled, captured or kept, and guidance acts at
        every evaluation."""
        graphs, loops, interval = self.graphs, self._loops, self.guidance_interval
        self.graphs, self._loops, self.guidance_interval = None, {}, (0.0, 1.0)
        try:
            with uncompiled(self.denoiser.network):
                yield
        finally:
            self.graphs, self._loops, self.guidance_interval = graphs, loops, interval

    def _stepped(
        self,
        solver: SteppedSolver,
        latents: torch.Tensor,
        images: np.ndarray,
        doubled: list[bool],
        conditioning: dict[bool, Conditioning],
        towards: tuple[torch.Tensor, torch.Tensor] | None,
        watch: "_Watch | None",
        on_evaluation: Callable[[], None] | None,
    ) -> torch.Tensor:
        """The loop around `scheduler.step` itself."""
        device = self.denoiser.device
        ids, guidance = (torch.from_numpy(images[name].copy()).to(device) for name in ("id", "guidance"))
        timesteps = torch.from_numpy(solver.timesteps).to(device, torch.float32)
        run = solver.begin(latents.to(device, torch.float32, copy=True), ids, seed=self.seed, stream=self.stream)
        channels = latents.shape[1]
        for evaluation, guided in enumerate(doubled):
            if on_evaluation:
                on_evaluation()
            if evaluation == 0 or guided != doubled[evaluation - 1]:
                self.denoiser.forget()
            # Predict; a variance is not guided, and is the conditional half's.
            given = run.network_input(evaluation).to(self.denoiser.dtype).repeat(1 + guided, 1, 1, 1)
            out = self.denoiser(given, timesteps[evaluation], conditioning[guided]).float()
            variance = out[-len(ids) :, channels:]
            out = out[:, :channels].contiguous()
            # Combine the guidance halves.
            if guided and self.guidance_rescale:
                out = rescale(out, guidance, self.guidance_rescale, backend=self.kernels)
            elif guided:
                out = combine(out, guidance)
            # Guide by the classifier: shift the predicted clean image, written as a change of the model's output.
            if towards is not None:
                clean = run.predicted_clean(evaluation, out)
                out = out + self._change(clean, solver, evaluation, *towards)
            # Move to the next noise level.
            run.advance(evaluation, torch.cat([out, variance], 1) if solver.learned_variance else out)
            if watch is not None:
                watch(evaluation, run.x)
        return run.x

    def _loop(self, shape: torch.Size, doubled: list[bool], conditioning: dict[bool, Conditioning]) -> "_Loop":
        """The buffers of batches like this one, made at the first."""
        layout = tuple(
            (name, value.shape, value.dtype) for part in conditioning.values() for name, value in part.items()
        )
        key = shape, frozenset(doubled), layout
        if key not in self._loops:
            whole = self.solver(0)
            assert isinstance(whole, SolverTable)
            self._loops[key] = _Loop(self, shape, whole, set(doubled), conditioning)
        return self._loops[key]

    def _replay(self, loop: "_Loop", guided: bool, after: bool) -> None:
        """Advance by a captured graph; without, from then on, if the network cannot be captured."""
        assert self.graphs is not None
        key = id(loop), guided, after
        try:
            self.graphs.replay(key, partial(loop.advance, guided, after), loop.changed)
        except RuntimeError as error:
            _log.warning("the network cannot be captured as a CUDA graph and runs without: %s", error)
            self.graphs = None
            loop.advance(guided, after)

    def _doubled(self, images: np.ndarray, solver: SolverTable | SteppedSolver) -> list[bool]:
        """Which evaluations run with the unconditional half: those in the interval, none when every scale is 1."""
        evaluations = len(solver)
        if self.denoiser.guidance == "embedded" or (images["guidance"] == 1.0).all():
            return [False] * evaluations
        if self.denoiser.guidance == "none":
            raise ModelError(
                "classifier-free guidance needs a model that knows a condition to leave out; set every recipe's "
                "guidance to 1"
            )
        low, high = self.guidance_interval
        position = (solver.start + np.arange(evaluations) * (self.steps - solver.start) / evaluations) / self.steps
        return ((low <= position) & (position < high)).tolist()

    def _conditionings(self, order: OrderBatch, rows: Rows, doubled: list[bool]) -> dict[bool, Conditioning]:
        """The conditioning of guided (True) and of unguided (False) evaluations, those that occur."""
        if not any(doubled):
            return {False: self.denoiser.condition(order, rows, False)}
        both = self.denoiser.condition(order, rows, True)
        return {True: both, False: conditional_half(both)}

    def _classifier_inputs(
        self, images: np.ndarray, solver: SolverTable | SteppedSolver
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Labels int64 [B] and scales fp32 [B] of classifier guidance; None when every scale is 0."""
        if (images["classifier_guidance"] == 0.0).all():
            return None
        if self.classifier is None:
            raise UsageError("classifier guidance needs a judge: set judge.enabled, or classifier_guidance to [0, 0]")
        if solver.clean is None:
            raise ModelError(
                f"{type(self.scheduler).__name__} does not tell the predicted clean image, which classifier guidance "
                "needs; set classifier_guidance to [0, 0], or model.scheduler to ddim"
            )
        device = self.denoiser.device
        labels = torch.from_numpy(images["label"].copy()).to(device)
        return labels, torch.from_numpy(images["classifier_guidance"].copy()).to(device)

    def _towards_label(
        self,
        table: SolverTable,
        loop: "_Loop",
        evaluation: int,
        labels: torch.Tensor,
        scale: torch.Tensor,
        out: torch.Tensor,
        guided: bool,
    ) -> torch.Tensor:
        """The network's output, changed so that the predicted clean image moves by the classifier's gradient."""
        assert table.clean is not None
        e = combine(out.float(), loop.guidance) if guided else out.float()
        m0 = float(table.clean[evaluation, 0]) * loop.x + float(table.clean[evaluation, 1]) * e
        if table.clip is not None:
            m0 = m0.clamp(-table.clip, table.clip)
        change = self._change(m0, table, evaluation, labels, scale).to(out.dtype)
        # Both halves move alike, so that the guidance combination moves by exactly this much.
        return out + (torch.cat([change, change]) if guided else change)

    def _change(
        self,
        m0: torch.Tensor,
        solver: SolverTable | SteppedSolver,
        evaluation: int,
        labels: torch.Tensor,
        scale: torch.Tensor,
    ) -> torch.Tensor:
        """What to add to the network's output so that the predicted clean image m0 moves by the classifier's shift."""
        assert self.classifier is not None and solver.clean is not None
        shift = classifier_shift(self.classifier, m0, labels, scale, float(solver.x0_scale[evaluation]))
        return shift / float(solver.clean[evaluation, 1])


def _at_least_unguided(images: np.ndarray) -> np.ndarray:
    """The images with guidance scales below 1 set to 1: to the pipelines of diffusers, too, they mean no guidance."""
    if not (images["guidance"] < 1.0).any():
        return images
    found = images.copy()
    found["guidance"] = np.maximum(found["guidance"], 1.0)
    return found


def _with_next(doubled: list[bool]) -> list[tuple[bool, bool]]:
    """Whether each evaluation, and the one after it, has an unconditional half."""
    return list(zip(doubled, [*doubled[1:], doubled[-1]], strict=True))


class _Paced:
    """`on_evaluation` on a GPU: called when no more than two evaluations wait for the device.

    Otherwise all evaluations of a batch would be queued at once: beats would say nothing of progress, then none would
    come until the batch is done, and a batch that nobody wants any more could not be abandoned.
    """

    def __init__(self, on_evaluation: Callable[[], None]):
        self._on_evaluation = on_evaluation
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._queued.append(event)
        if len(self._queued) > 2:
            self._queued.popleft().synchronize()
        self._on_evaluation()


class _Watch:
    """Logs each image once, at the evaluation after which it is no longer finite."""

    def __init__(self, ids: np.ndarray, timesteps: np.ndarray):
        self.ids, self.timesteps = ids, timesteps
        self.seen: set[int] = set()

    def __call__(self, evaluation: int, x: torch.Tensor) -> None:
        broken = (~torch.isfinite(x)).flatten(1).any(1).cpu().numpy()
        for image in self.ids[broken].tolist():
            if image not in self.seen:
                self.seen.add(image)
                _log.warning(
                    "image %d is not finite after evaluation %d of %d (timestep %g)",
                    image,
                    evaluation + 1,
                    len(self.timesteps),
                    self.timesteps[evaluation],
                )


class _Loop:
    """The buffers of batches of one shape, and the body of the loop over them.

    All that `advance` reads and writes keeps its address, and the evaluation is a counter on the device: called again
    it does the next evaluation, of this batch or of another, and so does a CUDA graph of it. x: fp32 [B, c, h, w];
    inputs: by whether guided, what the network is given, [B or 2B, c, h, w]; coef: fp32 [E, B, len(Column)] and
    timesteps: fp32 [E], filled from the front by images that enter later; noisy: whether any step draws noise.
    """

    def __init__(
        self,
        sampler: "Sampler",
        shape: torch.Size,
        whole: SolverTable,
        doubled: set[bool],
        conditioning: dict[bool, Conditioning],
    ):
        self.sampler, self.denoiser = sampler, sampler.denoiser
        device, size = self.denoiser.device, shape[0]
        layout = torch.channels_last if self.denoiser.settings.channels_last else torch.contiguous_format
        self.x = torch.empty(shape, device=device)
        self.history = torch.empty((HISTORY, *shape), device=device)
        self.inputs = {
            twice: torch.empty(((1 + twice) * size, *shape[1:]), dtype=self.denoiser.dtype, device=device).to(
                memory_format=layout
            )
            for twice in doubled
        }
        self.conditioning = {
            guided: {name: torch.empty_like(value) for name, value in part.items()}
            for guided, part in conditioning.items()
        }
        self.ids = torch.empty(size, dtype=torch.int64, device=device)
        self.guidance = torch.empty(size, device=device)
        self.coef = torch.zeros((len(whole), size, len(Column)), device=device)
        self.timesteps = torch.zeros(len(whole), device=device)
        self.noisy = whole.noisy
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self._now = torch.zeros(1, device=device)
        self.timestep = self._now.view(())
        self.changed = [self.x, self.history, self.index, self._now, *self.inputs.values()]
        self._columns: dict[int, Columns] = {}
        self._start = -1

    def begin(
        self, latents: torch.Tensor, images: np.ndarray, table: SolverTable, conditioning: dict[bool, Conditioning]
    ) -> None:
        """Take in a batch: its latents, ids, guidance scales, coefficients and conditioning."""
        if table.start != self._start:
            self._start = table.start
            self.coef.zero_()
            self.coef[: len(table)] = torch.from_numpy(table.coef).to(self.coef)[:, None]
            self.timesteps[: len(table)] = torch.from_numpy(table.timesteps).to(self.timesteps)
            if table.start not in self._columns:
                self._columns[table.start] = used_columns(self.coef)
            self.columns, self.clip = self._columns[table.start], table.clip
        self.guidance.copy_(torch.from_numpy(images["guidance"].copy()))
        self.coef[:, :, Column.GUIDANCE] = self.guidance
        self.ids.copy_(torch.from_numpy(images["id"].copy()))
        self.index.zero_()
        self.x.copy_(latents)
        for twice, given in self.inputs.items():
            given.copy_((self.x * table.in_first).repeat(1 + twice, 1, 1, 1))
        for guided, part in conditioning.items():
            for name, value in part.items():
                self.conditioning[guided][name].copy_(value)

    def advance(
        self, guided: bool, after: bool, shift: Callable[[torch.Tensor, bool], torch.Tensor] | None = None
    ) -> None:
        """One evaluation of the network and the solver step after it.

        guided, after: whether this evaluation and the next have an unconditional half; shift: changes the network's
        output.
        """
        sampler = self.sampler
        # Predict.
        torch.index_select(self.timesteps, 0, self.index, out=self._now)
        with torch.inference_mode():
            out = self.denoiser(self.inputs[guided], self.timestep, self.conditioning[guided])
        if self.denoiser.learned_variance:
            out = out[:, : self.x.shape[1]].contiguous()
        # Guide by the classifier: shift the predicted clean image, written as a change of the model's output.
        if shift is not None:
            out = shift(out, guided)
        if guided and sampler.guidance_rescale:
            out = rescale(out, self.guidance, sampler.guidance_rescale, backend=sampler.kernels)
            guided = False
        # Combine the guidance halves and move to the next noise level.
        step(
            self.x,
            out,
            self.coef,
            self.index,
            self.history,
            self.inputs[after],
            self.ids,
            seed=sampler.seed,
            stream=sampler.stream,
            guided=guided,
            clip=self.clip,
            noisy=self.noisy,
            columns=self.columns,
            backend=sampler.kernels,
        )
        self.index += 1

"""What is said about rates: the ratio that this machine can feed, and what to change where that is too little."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamaug.config import Config, ModelConfig, Recipe, StreamConfig
from streamaug.stream.rates.pace import Pace

_RATIOS = (0.5, 0.25, 0.1)  # shown beside the one that was asked for
_FEWEST_STEPS = 4  # of a solver that is not made for fewer
_MOST = 0.75  # share of the images from which the judge is no reason to be slow
_NARROW = 0.125  # a guidance interval of less than half of the schedule is left alone


@dataclass(frozen=True)
class Generator:
    """What producers run, as far as it decides how fast they are. model, recipes: None and empty where unknown."""

    stream: StreamConfig
    idle_cores: int  # that no rank's trainer or producers use; 0 where producers do not run on a CPU
    sampling: float  # share of the producers' time that goes into evaluations of the network
    acceptance: float  # share of the images that pass the judge
    model: ModelConfig | None = None
    recipes: Sequence[Recipe] = ()
    compiled: bool = False
    sharers: int = 1  # ranks that the producers make images for
    fleets: int = 1  # sets of producers on this machine

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        stream: StreamConfig,
        *,
        sampling: float,
        acceptance: float,
        on_cpu: bool,
        cores: int,
        trainers: int = 1,
        sharers: int = 1,
    ) -> "Generator":
        """options: of the engine; those of `streamaug.engine.build` say what it runs. trainers: on this machine, this
        one included; sharers: those among which the producers' images are shared."""
        fleets = max(trainers // sharers, 1)
        idle = max(cores - trainers - fleets * stream.producers * stream.threads, 0) if on_cpu else 0
        if "config" not in options or "execution" not in options:
            return cls(stream, idle, sampling, acceptance, sharers=sharers, fleets=fleets)
        config = Config.model_validate(options["config"])
        recipes = [recipe for recipe in config.recipes if recipe.weight > 0]
        compiled = bool(options["execution"].get("compile"))
        return cls(stream, idle, sampling, acceptance, config.model, recipes, compiled, sharers, fleets)


def announcement(ready_seconds: float, supply: float, ratio: float | None, *, warm: bool) -> str:
    """The line before the first step. supply: images a second that pass the judge; warm: not measured on the first
    batch alone."""
    shares = [ratio] if ratio else []
    shares += [share for share in _RATIOS if share != ratio]
    feeds = ", ".join(f"{share:g} up to {supply / share:,.0f}" for share in shares)
    rate = f"{supply:,.0f} images/s" if warm else f"at least {supply:,.0f} images/s (the first batch warmed it up)"
    return f"producer ready in {ready_seconds:.1f} s; {rate} pass the judge: ratio {feeds} training images/s"


def verdict(pace: Pace, generator: Generator) -> str:
    """What a loop that is not fed is told: the figures in one line, then a line for each thing that would help."""
    asked = "the generator is too slow" if pace.ratio is None else f"the generator is too slow for ratio {pace.ratio:g}"
    lines = [
        f"{asked}: training could use {pace.demand:,.0f} synthetic images/s, {pace.supply:,.0f} are made that pass the "
        f"judge, so {_consequence(pace, generator.stream)}. {_sustainable(pace)}. What would help in this run:"
    ]
    return "\n  ".join(lines + [f"- {line}" for line in remedies(pace, generator)])


def _consequence(pace: Pace, stream: StreamConfig) -> str:
    if stream.starved == "real":
        return f"{pace.missing:.0%} of what was asked for was left to real images"
    if stream.starved == "reuse" and pace.waiting < pace.missing:
        return f"an image is used {1 / max(pace.fed, 1e-9):.1f} times on average"
    return f"training stands still for {pace.waiting:.0%} of its time"


def _sustainable(pace: Pace) -> str:
    if pace.sustainable_ratio is None:
        return f"At full training speed {pace.fed:.2g} times the synthetic share is sustainable"
    return f"At full training speed ratio {_down(pace.sustainable_ratio)} is sustainable"


def _down(ratio: float) -> str:
    """Two digits, not rounded up."""
    digits = max(2, 1 - math.floor(math.log10(max(ratio, 1e-6))))
    return f"{math.floor(ratio * 10**digits) / 10**digits:g}"


def remedies(pace: Pace, generator: Generator) -> list[str]:
    """Settings with what they are, what they could be, and what that would give in this run."""
    found = []
    if pace.sustainable_ratio is not None:
        found.append(f"loader.ratio: {_down(pace.sustainable_ratio)} ({pace.ratio:g} now) needs no more than is made")
    if generator.model is not None:
        found += _of_sampling(pace, generator, generator.model)
    if generator.acceptance < _MOST:
        everything = pace.supply / max(generator.acceptance, 1e-9)
        found.append(
            f"recipes: the judge lets {generator.acceptance:.0%} of what is made pass, all of it would be "
            f"{everything:,.0f} images/s: less depth, or a better model, keeps the class"
        )
    found += _of_machine(pace, generator)
    uses = 1 / max(pace.fed, 1e-9)
    again = max(math.ceil(uses - 1), 1)
    if generator.stream.starved == "wait":
        found.append(
            f"stream.starved: reuse with max_reuse: {again} serves an image {uses:.1f} times on average "
            "instead of waiting"
        )
    elif generator.stream.starved == "reuse" and generator.stream.max_reuse < again:
        found.append(
            f"stream.max_reuse: {again} ({generator.stream.max_reuse} now) serves an image {uses:.1f} times on average "
            "and waits no more"
        )
    return found


def _of_sampling(pace: Pace, generator: Generator, model: ModelConfig) -> list[str]:
    def gives(left: float) -> str:
        """left: the evaluations that remain, as a share of those now."""
        rate = pace.supply / (1 - generator.sampling * (1 - left))
        return f"about {rate:,.0f} images/s, by {1 - left:.0%} fewer evaluations"

    found, left = [], _enough(pace.fed, generator.sampling)
    steps = max(math.floor(model.steps * left), _FEWEST_STEPS)
    if steps < model.steps:
        found.append(f"model.steps: {steps} ({model.steps} now) gives {gives(steps / model.steps)}")
    deep = [recipe for recipe in generator.recipes if recipe.rows == "latent"]
    share = sum(recipe.weight for recipe in deep) / max(sum(recipe.weight for recipe in generator.recipes), 1e-9)
    if deep and share == 1:
        low, high = min(recipe.depth[0] for recipe in deep), max(recipe.depth[1] for recipe in deep)
        shallow = max(high * left, low)
        if shallow < high:
            fewer = (low + shallow) / (low + high)
            found.append(
                f"recipes.depth: up to {shallow:.2g} ({high:g} now) gives {gives(fewer)}; images stay closer to the "
                "real ones"
            )
    found += _of_guidance(generator, model, gives)
    if not generator.compiled:
        found.append(
            "model.compile: true (off now, or not worth it for a run of this length) makes the network faster, by how "
            "much depends on the model"
        )
    return found


def _enough(fed: float, sampling: float) -> float:
    """The share of the evaluations at which the demand would be met; a half where none is little enough."""
    left = 1 - (1 - fed) / sampling if sampling > 0 else 0.0
    return left if left > 0.05 else 0.5


def _of_guidance(generator: Generator, model: ModelConfig, gives: Callable[[float], str]) -> list[str]:
    """Guidance acts least where the image is all noise or nearly clean (Kynkäänniemi et al. 2024): its middle half."""
    low, high = model.guidance_interval
    quarter = (high - low) / 4
    now, then = (
        sum(recipe.weight * _evaluations(recipe, *interval) for recipe in generator.recipes)
        for interval in ((low, high), (low + quarter, high - quarter))
    )
    if quarter < _NARROW or then >= now:
        return []
    return [
        f"model.guidance_interval: [{low + quarter:.2g}, {high - quarter:.2g}] ([{low:g}, {high:g}] now) gives "
        f"{gives(then / now)}: guidance evaluates the network twice"
    ]


def _evaluations(recipe: Recipe, low: float, high: float) -> float:
    """Of an image, as a share of the whole schedule; twice where guidance is on and acts, from `low` to `high`."""
    entry = 1 - sum(recipe.depth) / 2 if recipe.rows == "latent" else 0.0
    guided = max(high - max(low, entry), 0.0) if recipe.guidance[1] > 1 else 0.0
    return 1 - entry + guided


def _of_machine(pace: Pace, generator: Generator) -> list[str]:
    stream, idle = generator.stream, generator.idle_cores
    found = []
    why = f"{idle} cores are idle" if idle > 1 else "a core is idle"
    more = idle // (stream.threads * generator.fleets)
    producers = min(stream.producers + more, math.ceil(stream.producers / max(pace.fed, 1e-9)))
    if producers > stream.producers:
        rate = pace.supply * producers / stream.producers
        found.append(f"stream.producers: {producers} ({stream.producers} now) gives up to {rate:,.0f} images/s: {why}")
    if idle >= (generator.sharers - 1) * stream.producers * stream.threads > 0:
        found.append(
            "stream.shared: false (true now) gives each rank producers of its own, and with them up to "
            f"{pace.supply * generator.sharers:,.0f} images/s: {why}"
        )
    return found

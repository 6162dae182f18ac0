"""Which diffusers scheduler runs: the model's own, or another one built from its configuration, or why it cannot be."""

import importlib.util
import inspect
from functools import cache
from typing import Any

from streamaug.errors import ModelError, nearest

# Short name -> class and the configuration that the name stands for.
ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmsolver++_single": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "sa": ("SASolverScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "consistency": ("CMStochasticIterativeScheduler", {}),
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpmsolver++": ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
}

# Settings that change the noise schedule a network was trained with, and that not every class has.
_SCHEDULE = ("rescale_betas_zero_snr", "snr_shift_scale", "trained_betas")

_TOKENS = "it samples discrete tokens, not images or latents"
_BACKWARDS = "it runs from the image to the noise; `streamaug invert` does that"
_OWN_LOOP = "its step takes part in a loop that only its own pipeline has"

# Schedulers that are no general samplers of images or latents.
OTHER_JOBS = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "DDIMInverseScheduler": _BACKWARDS,
    "DPMSolverMultistepInverseScheduler": _BACKWARDS,
    "CogVideoXDPMScheduler": f"{_OWN_LOOP}: it is handed the previous prediction and timestep (video)",
    "HeliosScheduler": f"{_OWN_LOOP}: several stages of different sizes (video)",
    "HeliosDMDScheduler": f"{_OWN_LOOP}: several stages of different sizes (video)",
    "KarrasVeScheduler": f"{_OWN_LOOP}: noise is added before and corrected after each call of the network",
    "MiniMaxH3Scheduler": f"{_OWN_LOOP}: its time runs upwards and n steps make n - 1 evaluations (video)",
    "PiflowScheduler": f"{_OWN_LOOP}: the network predicts a policy that it runs itself",
    "RFD4ProteinaScheduler": f"{_OWN_LOOP}: it is handed a mask of residues (proteins)",
    "RePaintScheduler": f"{_OWN_LOOP}: it is handed an image and a mask (inpainting)",
    "ScoreSdeVeScheduler": f"{_OWN_LOOP}: a predictor and a corrector step",
    "ScoreSdeVpScheduler": f"{_OWN_LOOP}: a predictor step that is no `step`",
    "SCMScheduler": f"{_OWN_LOOP}: the network's input and output are rescaled around it (Sana-Sprint)",
    "UnCLIPScheduler": f"{_OWN_LOOP}: it is handed the previous timestep",
    "ConsistencyDecoderScheduler": "it decodes latents to images, in two fixed steps",
    "IPNDMScheduler": "it has no add_noise, so what an image holds at a step is unknown (it is an audio sampler)",
}


def make_scheduler(saved: Any, name: str) -> Any:
    """The model's own scheduler ("keep"), or another built from its configuration.

    name: "keep", one of ALIASES, or the name of a diffusers scheduler class. Raises ModelError when the name is
    unknown, the scheduler is for another job or lacks a dependency, or the saved configuration does not suit it.
    """
    if name == "keep":
        refuse_other_jobs(type(saved).__name__)
        return saved
    class_name, settings = ALIASES.get(name, (name, {}))
    cls = scheduler_class(class_name)
    settings = dict(settings)
    ours, wanted = kind(type(saved), saved.config), kind(cls)
    shift = setting(saved, "shift") or setting(saved, "flow_shift") or 1.0
    if _can_flow(cls, ours):
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    elif ours == wanted == "flow matching":
        settings |= {"shift": shift} if "shift" in _init_parameters(cls) else {}
    elif ours != wanted:
        raise ModelError(
            f"model.scheduler {name}: {class_name} runs {wanted} models and the model's own {type(saved).__name__} is "
            f"for {ours}; keep it{_or_one_of(_of_kind(ours))}"
        )
    _refuse_another_schedule(saved, cls)
    if type(saved) is cls and all(saved.config.get(key) == value for key, value in settings.items()):
        return saved
    return cls.from_config(saved.config, **settings)


def configured(scheduler: Any, overrides: dict[str, Any]) -> Any:
    """The scheduler with some of its configuration replaced. Raises ModelError for a key or value it does not take."""
    cls = type(scheduler)
    known = _init_parameters(cls)
    for key in overrides:
        if key not in known:
            raise ModelError(
                f"model.scheduler_config.{key}: {cls.__name__} has no such setting{nearest(key, known)}; "
                f"accepted: {', '.join(sorted(known))}"
            )
    if not overrides:
        return scheduler
    try:
        return cls.from_config(scheduler.config, **overrides)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"model.scheduler_config: {cls.__name__} cannot be made with it: {error}") from None


def scheduler_class(name: str) -> Any:
    """The diffusers class of that name. Raises ModelError when there is none that samples images here."""
    import diffusers
    from diffusers import schedulers

    refuse_other_jobs(name)
    cls = getattr(diffusers, name, None) or getattr(schedulers, name, None)
    missing = [package for package in getattr(cls, "_backends", ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise ModelError(f"{name} needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin):
        known = ["keep", *ALIASES, *scheduler_names()]
        raise ModelError(
            f"model.scheduler {name}: unknown{nearest(name, known)}; expected keep, one of {', '.join(ALIASES)}, "
            "or the name of a diffusers scheduler class"
        )
    return cls


def scheduler_names() -> list[str]:
    """The names of all scheduler classes of the installed diffusers, those with a missing dependency included."""
    import diffusers
    from diffusers import schedulers
    from diffusers.schedulers import deprecated

    names = {name for module in (diffusers, schedulers, deprecated) for name in dir(module)}
    return sorted(name for name in names if name.endswith("Scheduler"))


def refuse_other_jobs(name: str) -> None:
    """Raises ModelError for a class that does not sample images or latents step by step."""
    if name in OTHER_JOBS:
        raise ModelError(
            f"{name} cannot be used: {OTHER_JOBS[name]}; set model.scheduler to one of {', '.join(ALIASES)}"
        )


def kind(cls: type, config: Any = None) -> str:
    """What a scheduler's network was trained for, as far as one scheduler can stand in for another."""
    may_flow = config is not None and "use_flow_sigmas" in _init_parameters(cls)
    if may_flow and (config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"):
        return "flow matching"
    if cls.__name__.startswith(("FlowMa", "LTXEuler")):
        return "flow matching"
    if "beta_schedule" in _init_parameters(cls):
        return "diffusion"
    if cls.__name__.startswith(("EDM", "Cosine")):
        return "EDM"
    if cls.__name__.startswith("CM"):
        return "consistency"
    return cls.__name__


def setting(scheduler: Any, key: str) -> Any:
    """A configuration value if the scheduler's class has that setting, else None.

    A scheduler built from another's configuration carries settings that are not its own.
    """
    return scheduler.config.get(key) if key in _init_parameters(type(scheduler)) else None


def _refuse_another_schedule(saved: Any, cls: type) -> None:
    """Raises ModelError when the saved noise schedule has a setting that the class would leave out."""
    for key in _SCHEDULE:
        if setting(saved, key) and key not in _init_parameters(cls):
            raise ModelError(
                f"{cls.__name__} has no {key}, which the model's own {type(saved).__name__} sets to "
                f"{setting(saved, key)}: it would run another noise schedule; keep the model's own"
            )


def _of_kind(wanted: str) -> list[str]:
    """The short names that run models of that kind."""
    import diffusers

    classes = {alias: getattr(diffusers, class_name) for alias, (class_name, _) in ALIASES.items()}
    return [alias for alias, cls in classes.items() if kind(cls) == wanted or _can_flow(cls, wanted)]


def _or_one_of(names: list[str]) -> str:
    return f", or choose one of {', '.join(names)}" if names else ""


def _can_flow(cls: type, wanted: str) -> bool:
    """Whether a scheduler of diffusion models can be set to flow matching, if that is wanted, and ends at noise 0."""
    return wanted == "flow matching" and {"use_flow_sigmas", "final_sigmas_type"} <= set(_init_parameters(cls))


def _init_parameters(cls: Any) -> Any:
    return _parameters(cls.__init__)


@cache
def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters

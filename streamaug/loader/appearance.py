"""What a batch of images looks like, and whether real and synthetic ones can go into one batch."""

from dataclasses import dataclass

import torch

from streamaug.errors import MismatchError


@dataclass(frozen=True)
class Appearance:
    """dtype, shape of one image, device, and the values of all pixels: range, mean, standard deviation."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device
    low: float
    high: float
    mean: float
    std: float
    note: str = ""

    @classmethod
    def of(cls, images: torch.Tensor, note: str = "") -> "Appearance":
        """`images`: [n, ...] of any dtype; non-finite values are left out of the figures."""
        values = images.float()
        values = values[torch.isfinite(values)]
        low = high = mean = std = 0.0
        if values.numel():
            low, high, mean, std = torch.stack(
                [values.min(), values.max(), values.mean(), values.std(correction=0)]
            ).tolist()
        return cls(images.dtype, tuple(images.shape[1:]), images.device, low, high, mean, std, note)

    @property
    def span(self) -> float:
        return self.high - self.low

    @property
    def scale(self) -> str:
        """How the pixels are scaled: one of "0 to 1", "0 to 255", "-1 to 1", "normalised", "unknown".

        Pixels whose mean is near 0 and whose standard deviation is near 1 were normalised.
        """
        # Floats go a little beyond where they were resized or their contrast was changed.
        if self.dtype == torch.uint8 or (self.low >= -25 and 100 <= self.high <= 280):
            return "0 to 255"
        if self.low >= -1e-3 and self.high <= 1.001:
            return "0 to 1"
        size = max(-self.low, self.high)
        if self.low < 0 and 0.9 <= size <= 1.001 and self.std < 0.8:
            return "-1 to 1"
        if self.low < 0 and abs(self.mean) < 1.5 and 0.3 < self.std < 3:
            return "normalised"
        return "unknown"

    def __str__(self) -> str:
        scale = "" if self.scale == "unknown" else f" ({self.scale})"
        values = f"values {_short(self.low)} to {_short(self.high)}, mean {_short(self.mean)}, std {_short(self.std)}"
        place = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"{name_of(self.dtype)} {list(self.shape)}{place}, {values}{scale}{self.note}"


def check(real: Appearance, synthetic: Appearance, from_dataset: bool) -> None:
    """Raise MismatchError where the two differ in layout, shape, dtype or range, with the setting that fixes it.

    `synthetic` describes black, white and shaded probes: the whole range that synthetic images can have.
    """
    if channels_last(synthetic.shape) == real.shape != synthetic.shape:
        _refuse(
            "layout",
            real,
            synthetic,
            "pass transform=lambda image: image.permute(1, 2, 0), or let the collate_fn give [n, C, H, W]",
        )
    if real.shape != synthetic.shape:
        _refuse(
            "shape",
            real,
            synthetic,
            f"{_settings_for(real.shape)} of the stream's configuration, or pass transform= (uint8 tensor [C, H, W] -> "
            f"{list(real.shape)})",
        )
    if real.dtype != synthetic.dtype:
        _refuse("dtype", real, synthetic, "pass transform= returning the real dtype, or transform=None")
    if real.dtype == torch.uint8 or synthetic.span <= 0:
        return
    slack = (2.0 if from_dataset else 0.25) * synthetic.span
    inside = synthetic.low - slack <= real.low and real.high <= synthetic.high + slack
    unit = real.low >= -1e-3 and real.high <= 1.001
    synthetic_unit = synthetic.low >= -0.05 and synthetic.high <= 1.05
    if not inside or real.span < 0.1 * synthetic.span or (unit and not synthetic_unit):
        _refuse("range", real, synthetic, _RANGE_FIXES.get(real.scale, _RANGE_FIXES["unknown"]))


def _settings_for(shape: tuple[int, ...]) -> str:
    """Which settings make images of this shape, with their values where they can."""
    if len(shape) == 3 and shape[0] in (1, 3) and shape[1] == shape[2]:
        return f"set data.image_size: {shape[1]} and data.channels: {shape[0]}"
    return "set data.image_size and data.channels"


_RANGE_FIXES = {
    "0 to 1": "leave out normalize=, and let transform= return [0, 1], as ToDtype(torch.float32, scale=True) does",
    "0 to 255": "let transform= return 0 to 255, or pass transform=None",
    "normalised": "pass normalize=(mean, std), the numbers that the real images are normalised with",
    "unknown": "pass normalize=(mean, std) as the real images are normalised, or transform= (uint8 tensor [C, H, W] -> "
    "the real range)",
}
_RANGE_FIXES["-1 to 1"] = _RANGE_FIXES["unknown"]


def check_device(made: torch.Tensor, wanted: torch.device, source: str) -> None:
    """Raise MismatchError where a transform leaves images on a device that the real batch is not on."""
    if made.device.type not in (wanted.type, "cpu"):
        raise MismatchError(
            "real and synthetic images differ in device:\n"
            f"  real:      on {wanted}\n"
            f"  synthetic: on {made.device} (after {source})\n"
            f"return images on {wanted}, or on the CPU: the loader moves them to the real batch's device"
        )


def natural_scale(real: Appearance) -> tuple[tuple[float], tuple[float]] | None:
    """(mean, std) that takes [0, 1] to the real range where that is plain: 0 to 255, or -1 to 1."""
    return {"0 to 255": ((0.0,), (1 / 255,)), "-1 to 1": ((0.5,), (0.5,))}.get(real.scale)


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[H, W, C] of [C, H, W]."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse(what: str, real: Appearance, synthetic: Appearance, fix: str) -> None:
    raise MismatchError(
        f"real and synthetic images differ in {what}:\n  real:      {real}\n  synthetic: {synthetic}\n{fix}"
    )


def _short(value: float) -> str:
    return f"{round(value, 3):g}"

"""How a network is run: its memory layout, cheaper forms of two layers, compiled or not. All adapters use it."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from streamaug.errors import ConfigError

_log = logging.getLogger("streamaug")

COMPILE_SECONDS = 30.0  # one batch shape, cold, on two cores
"""About what compiling one batch shape takes."""


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call, None if there is none: $CXX, or g++."""
    return shutil.which(os.environ.get("CXX", "g++"))


def require_compiler() -> None:
    """Raises ConfigError when there is no C++ compiler."""
    if compiler() is None:
        asked = os.environ.get("CXX", "g++")
        other = shutil.which("clang++")
        hint = f"set CXX={other}" if other else "install one (g++)"
        raise ConfigError(
            f"model.compile is true, but torch.compile needs a C++ compiler and '{asked}' is not there; "
            f"{hint}, or set model.compile to auto or false"
        )


def laid_out(network: Any, channels_last: bool) -> Any:
    """The network in the layout it runs in, with `PixelAttention` and, on a CPU, `FoldedUpsample` where they fit."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    from diffusers.models.upsampling import Upsample2D

    for module in [each for each in network.modules() if not isinstance(each, FoldedUpsample)]:
        for name, child in module.named_children():
            if isinstance(child, Upsample2D) and _folds(child):
                setattr(module, name, FoldedUpsample(child))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0 and _over_pixels(module):
            module.set_processor(PixelAttention(module.processor))
    return network


def compile_network(network: Any, backend: str = "inductor") -> None:
    """Compile the network in place, once for each input shape, at the first call with it.

    Guards on the modules themselves are left out, since nothing changes a network that only samples: they cost a
    tenth of a small network's time. Each network has a backend function of its own, which keeps another network of
    the same class from being given its code. Raises ConfigError without a compiler.
    """
    from torch._dynamo import lookup_backend

    if backend == "inductor":
        require_compiler()
    compile_graph = lookup_backend(backend)

    def compiling(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        _log.info("compiling the network, about %.0f s, once a batch shape", COMPILE_SECONDS)
        began = time.perf_counter()
        compiled = compile_graph(graph, inputs)
        _log.info("compiled the network in %.0f s", time.perf_counter() - began)
        return compiled

    without_modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    network.compile(backend=compiling, dynamic=False, options={"guard_filter_fn": without_modules})


@contextmanager
def uncompiled(network: Any) -> Iterator[None]:
    """Within it the network runs as it is, so that a batch shape that is tried once is not compiled."""
    compiled, network._compiled_call_impl = network._compiled_call_impl, None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


class FoldedUpsample(nn.Module):
    """Nearest-neighbour doubling and the 3x3 convolution after it, as one transposed convolution of 4x4 and stride 2.

    The same sum over 4 distinct pixels instead of 9 copies: under half the multiplications. `otherwise` makes other
    sizes than the double.
    """

    def __init__(self, otherwise: Any):
        super().__init__()
        self.otherwise = otherwise
        weight = otherwise.conv.weight.detach()
        planes = weight.float().flip(2, 3).flatten(0, 1)[:, None]
        doubled = F.conv2d(planes, torch.ones(1, 1, 2, 2), padding=1)
        folded = doubled.view(*weight.shape[:2], 4, 4).transpose(0, 1)
        self.weight = nn.Parameter(folded.to(weight.dtype).contiguous(), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        if output_size is not None:
            return self.otherwise(hidden_states, output_size)
        return F.conv_transpose2d(hidden_states, self.weight, self.otherwise.conv.bias, stride=2, padding=1)


class PixelAttention:
    """Self-attention over an image's pixels [B, C, H, W] whose projections are one matrix product each.

    diffusers' own hands the projections a transposed view, which torch multiplies image by image; `otherwise` is
    called for whatever is not plain self-attention.
    """

    def __init__(self, otherwise: Callable):
        self.otherwise = otherwise

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None or hidden_states.dim() != 4:
            return self.otherwise(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        batch, channels, height, width = hidden_states.shape
        pixels = attn.group_norm(hidden_states).permute(0, 2, 3, 1).reshape(-1, channels)
        query, key, value = (
            project(pixels).view(batch, height * width, attn.heads, -1).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out = attn.to_out[0](mixed.transpose(1, 2).reshape(batch * height * width, -1))
        out = out.view(batch, height, width, -1).permute(0, 3, 1, 2)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


def _folds(upsample: Any) -> bool:
    """Whether it is a doubling and a 3x3 convolution and no more, on a CPU: on a GPU this is not measured yet."""
    conv = getattr(upsample, "conv", None)
    if not isinstance(conv, nn.Conv2d) or upsample.norm is not None or not upsample.interpolate:
        return False
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.weight.device.type == "cpu"


def _over_pixels(attn: Any) -> bool:
    """Whether it is plain self-attention after a group norm."""
    extras = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")
    plain = all(getattr(attn, extra, None) is None for extra in extras)
    return plain and attn.group_norm is not None and not attn.is_cross_attention

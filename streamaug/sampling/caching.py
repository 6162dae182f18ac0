"""Attention reused between evaluations: faster, and an approximation that the user asks for.

Pyramid Attention Broadcast (Zhao et al. 2024, "Real-Time Video Generation with Pyramid Attention Broadcast"), through
diffusers' own hooks. It follows a fixed rhythm and looks at no values, so an image still depends on its order alone.
"""

from typing import Any

from streamaug.errors import ModelError


class AttentionCache:
    """Hooks on a network's attention layers: each is computed at every n-th evaluation and reused in between."""

    def __init__(self, network: Any, every: int):
        """every: n, at least 2. Raises ModelError when diffusers finds no attention layer to hook."""
        from diffusers.hooks import HookRegistry, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        always = (-1, 1)  # the range of timesteps that reuse; the callback is inside
        apply_pyramid_attention_broadcast(
            network,
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=every,
                cross_attention_block_skip_range=every,
                spatial_attention_timestep_skip_range=always,
                cross_attention_timestep_skip_range=always,
                current_timestep_callback=lambda: 0,
            ),
        )
        registries = [getattr(module, "_diffusers_hook", None) for module in network.modules()]
        self._registries = [registry for registry in registries if isinstance(registry, HookRegistry)]
        if not self._registries:
            raise ModelError(
                f"model.attention_cache: {type(network).__name__} has no attention that can be reused; set it to 1"
            )

    def forget(self) -> None:
        """Compute everything at the next evaluation: another batch, or another batch shape."""
        for registry in self._registries:
            registry.reset_stateful_hooks(recurse=False)

"""How a network is run: attention over pixels, and compiling."""

import logging
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.utils.flop_counter import FlopCounterMode

from streamaug.errors import ConfigError
from streamaug.sampling.network import (
    FoldedUpsample,
    PixelAttention,
    compile_network,
    compiler,
    laid_out,
    uncompiled,
)


def unet(width=8) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    ).eval()


def one_level(width) -> UNet2DModel:
    """What takes the least time to trace."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (width,)}
    return UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks).eval()


def images(batch_size=3):
    return torch.randn(batch_size, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(network, x):
    return network(x, torch.tensor(7.0), return_dict=False)[0]


@pytest.mark.parametrize("channels_last", [True, False])
def test_attention_over_pixels_gives_what_diffusers_own_gives(channels_last):
    ours = laid_out(unet(), channels_last)
    replaced = [module for module in ours.modules() if isinstance(getattr(module, "processor", None), PixelAttention)]
    assert len(replaced) == 4
    torch.testing.assert_close(run(ours, images()), run(unet(), images()), atol=1e-5, rtol=1e-5)


def test_upsampling_folded_into_its_convolution_gives_what_diffusers_own_gives_at_half_the_cost():
    network = laid_out(laid_out(unet(), True), True)  # a second time changes nothing
    (folded,) = (module for module in network.modules() if isinstance(module, FoldedUpsample))
    x = torch.randn(2, folded.weight.shape[0], 3, 5)
    torch.testing.assert_close(folded(x), folded.otherwise(x), atol=1e-5, rtol=1e-5)
    assert folded(x, (7, 9)).shape[2:] == (7, 9)
    counted = []
    for run_it in (folded, folded.otherwise):
        with FlopCounterMode(display=False) as counter:
            run_it(x)
        counted.append(counter.get_total_flops())
    assert counted[0] < 0.5 * counted[1]


def test_attention_of_another_kind_keeps_its_processor():
    network = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    processors = laid_out(network, True).attn_processors.values()
    assert {type(processor) for processor in processors} == {AttnProcessor2_0}


def test_what_is_not_plain_self_attention_is_left_to_the_processor_that_was_there():
    network = laid_out(unet(), False)
    attention = next(module for module in network.modules() if hasattr(module, "processor"))
    tokens = torch.randn(2, 5, attention.to_q.in_features)
    after = attention.processor(attention, tokens)
    torch.testing.assert_close(after, AttnProcessor2_0()(attention, tokens))


def test_two_compiled_networks_of_one_class_do_not_share_code_and_say_when_they_compile(caplog):
    narrow, wide = one_level(8), one_level(16)
    expected = [run(narrow, images()), run(wide, images())]
    with caplog.at_level(logging.INFO, "streamaug"):
        for network in (narrow, wide):
            compile_network(network, backend="eager")
        for _ in range(2):
            for network, value in zip((narrow, wide), expected, strict=True):
                torch.testing.assert_close(run(network, images()), value, atol=1e-5, rtol=1e-5)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert said[0] == "compiling the network, about 30 s, once a batch shape"
    assert said[1].startswith("compiled the network in")


def test_a_network_that_is_tried_uncompiled_compiles_nothing_and_stays_compiled():
    network, compiled = one_level(8), []
    compile_network(network, backend="eager")
    network._compiled_call_impl = lambda *args, **kwargs: compiled.append(1) or (None,)
    with uncompiled(network):
        assert run(network, images()).shape == (3, 3, 8, 8)
    assert not compiled
    run(network, images())
    assert compiled == [1]


@pytest.mark.matrix
@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler")
def test_what_is_compiled_once_is_found_in_torchs_cache_by_another_network(tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    hits = []
    for _ in range(2):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.SiLU())
        compile_network(network)
        counters.clear()
        with torch.inference_mode():
            network(images())
        hits.append(counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 1]


@pytest.mark.parametrize("clang", [None, "/usr/bin/clang++"])
def test_compiling_without_a_compiler_is_one_clear_error(monkeypatch, clang):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(shutil, "which", lambda name: clang if name == "clang++" else None)
    with pytest.raises(ConfigError, match=r"model\.compile is true.*'no-such-compiler' is not there") as raised:
        compile_network(unet())
    assert ("set CXX=/usr/bin/clang++" in str(raised.value)) == (clang is not None)

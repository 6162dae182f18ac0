"""T5: texts to token embeddings, for the families that have a T5, alone or beside their CLIPs."""

from collections.abc import Sequence
from pathlib import Path

import torch

from streamaug.sampling.denoisers.prompts import load_text_encoder, load_tokenizer, token_batch

_TEXTS_AT_ONCE = 8


@torch.no_grad()
def encode_t5(
    path: Path,
    component: str,
    texts: Sequence[str],
    limit: int,
    *,
    variant: str | None = None,
    device: torch.device,
    masked: bool = False,
) -> torch.Tensor:
    """Hidden states fp32 [N, limit, D] on the CPU, padding included.

    component: "text_encoder_3" with "tokenizer_3", and so on; the encoder is freed before the function returns.
    masked: hide the padding from the texts' own tokens; most of these networks were trained without a mask.
    Raises ModelError, PromptTooLong and MissingExtra.
    """
    batch = token_batch(load_tokenizer(path, component.replace("text_encoder", "tokenizer")), list(texts), limit)
    encoder = load_text_encoder(path, component, variant, device)
    hidden = []
    parts = (batch[key].to(device).split(_TEXTS_AT_ONCE) for key in ("input_ids", "attention_mask"))
    for ids, mask in zip(*parts, strict=True):
        hidden.append(encoder(ids, attention_mask=mask if masked else None)[0].float().cpu())
    return torch.cat(hidden)

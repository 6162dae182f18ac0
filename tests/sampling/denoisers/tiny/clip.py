"""Random CLIP text encoders and a tokenizer of single bytes, small enough for tests."""

import json
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS = 77


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and no merges, made from files written to `folder`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(width: int = 32, *, projection: int | None = None, seed: int = 0) -> CLIPTextModel:
    """A random text encoder of that width; with a projection, one that also gives text_embeds of that size."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        projection_dim=projection or width,
        initializer_range=0.2,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()

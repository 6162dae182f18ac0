"""A random T5 encoder and a tokenizer of single letters, small enough for tests."""

import string

import torch
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
_PIECES += [(letter, -3.0) for letter in string.ascii_letters + string.digits + string.punctuation]


def tokenizer() -> T5TokenizerFast:
    return T5TokenizerFast(vocab=_PIECES, extra_ids=0, model_max_length=512)


def text_encoder(width: int) -> T5EncoderModel:
    torch.manual_seed(3)
    config = T5Config(vocab_size=len(_PIECES), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()

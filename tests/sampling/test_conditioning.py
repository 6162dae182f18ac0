"""Encoded prompts: one file a model and its wordings, made once, and which wording an order gets."""

import gc
import shutil
import weakref

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling.denoisers.prompted import CLASSES, CPU, TEMPLATES, noise
from sampling.denoisers.tiny.stable_diffusion import build

from streamaug.config import Recipe
from streamaug.errors import ConfigError, MissingExtra, ModelError
from streamaug.orders import ORDER_DTYPE, OrderBatch, Planner, Schedule
from streamaug.sampling.conditioning import encode_prompts, wordings
from streamaug.sampling.denoisers import FAMILIES, inspect, prompts, stable_diffusion
from streamaug.sampling.denoisers.prompts import PromptTable, prompt_conditioning
from streamaug.sampling.memory import peak_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build(folder)
    return inspect(folder)


def test_every_class_has_every_wording_and_the_negative_prompt_is_beside_them(model, tmp_path):
    path = encode_prompts(model, CLASSES, TEMPLATES, tmp_path, negative="blurry")
    tensors = load_file(path)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "tokens": (3, 2, 77, 32),
        "null.tokens": (77, 32),
    }
    texts = ["a photo of a dog", "fire engine, up close", "blurry"]
    alone = stable_diffusion.encode_text(model, texts, None, CPU)["tokens"]
    torch.testing.assert_close(tensors["tokens"][1, 0], alone[0])
    torch.testing.assert_close(tensors["tokens"][2, 1], alone[1])
    torch.testing.assert_close(tensors["null.tokens"], alone[2])


def test_a_second_call_loads_no_text_encoder(model, tmp_path, monkeypatch):
    first = encode_prompts(model, CLASSES, TEMPLATES, tmp_path)
    written = first.stat().st_mtime_ns

    def refuse(*args, **kwargs):
        raise AssertionError("the text encoder was loaded again")

    monkeypatch.setattr(prompts, "load_text_encoder", refuse)
    monkeypatch.setattr(prompts, "load_tokenizer", refuse)
    assert encode_prompts(model, CLASSES, TEMPLATES, tmp_path) == first
    assert first.stat().st_mtime_ns == written
    with pytest.raises(AssertionError, match="loaded again"):
        encode_prompts(model, CLASSES, [*TEMPLATES, "a {}"], tmp_path)


def test_the_text_encoder_is_gone_when_the_prompts_are_encoded(model, tmp_path, monkeypatch):
    original, made = prompts.load_text_encoder, []

    def load(*args):
        encoder = original(*args)
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(prompts, "load_text_encoder", load)
    encode_prompts(model, CLASSES, TEMPLATES, tmp_path)
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_another_text_class_order_or_token_is_another_file(model, tmp_path):
    save_file({"sks": noise((1, 32))}, tmp_path / "sks.safetensors")
    made = [
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path),
        encode_prompts(model, CLASSES[::-1], TEMPLATES, tmp_path),
        encode_prompts(model, CLASSES, TEMPLATES[:1], tmp_path),
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path, negative="blurry"),
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path, class_tokens=[tmp_path / "sks.safetensors"]),
    ]
    save_file({"sks": noise((1, 32), seed=9)}, tmp_path / "sks.safetensors")
    made.append(encode_prompts(model, CLASSES, TEMPLATES, tmp_path, class_tokens=[tmp_path / "sks.safetensors"]))
    assert len(set(made)) == len(made)


def test_another_text_encoder_is_another_file(model, tmp_path):
    shutil.copytree(model.path, tmp_path / "model")
    again = encode_prompts(inspect(tmp_path / "model"), CLASSES, TEMPLATES, tmp_path)
    assert again == encode_prompts(model, CLASSES, TEMPLATES, tmp_path)
    weights = tmp_path / "model" / "text_encoder" / "model.safetensors"
    save_file({name: value * 1.1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert encode_prompts(inspect(tmp_path / "model"), CLASSES, TEMPLATES, tmp_path) != again


def test_prompts_are_cleaned_by_the_families_whose_pipelines_do():
    for family in FAMILIES.values():
        cleans = {hasattr(getattr(diffusers, name), "_text_preprocessing") for name in family.PIPELINES}
        assert cleans == {hasattr(family, "cleaned")}, family.FAMILY


def test_many_texts_are_encoded_as_alone(model):
    texts = [f"number {i}" for i in range(35)]
    together = stable_diffusion.encode_text(model, texts, None, CPU)["tokens"]
    for i in (0, 31, 32, 34):
        alone = stable_diffusion.encode_text(model, texts[i : i + 1], None, CPU)["tokens"]
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_prompt_that_is_too_long_names_the_class_and_is_not_cut(model, tmp_path):
    with pytest.raises(ModelError, match=r"the prompt of class 'x{70}' has 8\d tokens, the text encoder takes 77"):
        encode_prompts(model, ["cat", "x" * 70], TEMPLATES, tmp_path)
    with pytest.raises(ModelError, match=r"model\.negative_prompt has \d+ tokens"):
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path, negative="x" * 80)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {0}"])
def test_a_template_without_its_braces_is_refused_by_its_number(model, tmp_path, template):
    with pytest.raises(ConfigError, match=r"model\.prompts\.1: .* needs \{\} once"):
        encode_prompts(model, CLASSES, ["a {}", template], tmp_path)


def test_a_class_may_have_wordings_of_its_own(model, tmp_path):
    own = {"dog": ["a beagle asleep"], "default": ["a {}", "one {}"]}
    assert wordings(own, ["cat", "dog"]) == [["a cat", "one cat"], ["a beagle asleep", "a beagle asleep"]]
    table = load_file(encode_prompts(model, ["cat", "dog"], own, tmp_path))["tokens"]
    expected = stable_diffusion.encode_text(model, ["a cat", "one cat", "a beagle asleep"], None, CPU)["tokens"]
    torch.testing.assert_close(table.flatten(0, 1), expected[[0, 1, 2, 2]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"dgo": ["a {}"]}, r"no class 'dgo' \(did you mean 'dog'\?\); accepted: cat, dog, default"),
        ({"dog": ["a {}"]}, r"class 'cat' has none; add it, or default: \[a photo of a \{\}\]"),
        ({"default": ["a dog"]}, r"model\.prompts\.default\.0: 'a dog' needs \{\} once"),
        ({"default": ["a {}"], "dog": ["{} {}"]}, r"model\.prompts\.dog\.0: .* at most once"),
    ],
)
def test_wordings_that_do_not_fit_the_classes_are_refused(own, message):
    with pytest.raises(ConfigError, match=message):
        wordings(own, ["cat", "dog"])


def test_a_class_name_with_braces_is_taken_as_it_is(model, tmp_path):
    path = encode_prompts(model, ["{}", "{0}"], ["a {}"], tmp_path)
    expected = stable_diffusion.encode_text(model, ["a {}", "a {0}"], None, CPU)["tokens"]
    torch.testing.assert_close(load_file(path)["tokens"][:, 0], expected)


def test_class_tokens_of_a_family_without_them_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.delattr(stable_diffusion, "CLASS_TOKENS")
    with pytest.raises(ConfigError, match="StableDiffusion takes none; accepted are models of: StableDiffusionXL"):
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path, class_tokens=[tmp_path / "a.safetensors"])


def test_a_class_token_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(ModelError, match=r"model\.class_tokens .*none\.safetensors: cannot be read"):
        encode_prompts(model, CLASSES, TEMPLATES, tmp_path, class_tokens=[tmp_path / "none.safetensors"])


def test_without_transformers_the_extra_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"streamaug\[text\]"):
        encode_prompts(model, CLASSES, ["not cached {}"], tmp_path)


def test_orders_choose_among_the_wordings_and_get_theirs(model, tmp_path):
    table = PromptTable.load(encode_prompts(model, CLASSES, TEMPLATES, tmp_path), CPU, torch.float32)
    planner = Planner(
        np.array([0, 1, 2]),
        3,
        Schedule(np.linspace(0, 1, 6), np.linspace(1, 0, 6)),
        [Recipe(kind="noise")],
        32,
        seed=0,
        templates=len(TEMPLATES),
    )
    order = planner.batch(0, planner.uniform())
    assert set(order.images["template"].tolist()) == {0, 1}
    found = prompt_conditioning(order, {}, table, guided=True)["tokens"]
    assert found.shape == (64, 77, 32)
    for i, image in enumerate(order.images):
        torch.testing.assert_close(found[32 + i], table.embeddings["tokens"][image["label"], image["template"]])
        torch.testing.assert_close(found[i], table.null["tokens"])


def test_a_table_that_is_large_stays_in_its_file_and_only_rows_in_use_are_brought(tmp_path, monkeypatch):
    classes, size = 200, 40_000
    tokens = torch.arange(classes * 2, dtype=torch.float32).view(classes, 2, 1).expand(-1, -1, size).contiguous()
    save_file({"tokens": tokens, "null.tokens": noise((size,))}, tmp_path / "table.safetensors")
    labels, templates = np.array([7, 199, 7, 0]), np.array([1, 0, 1, 0])
    whole = PromptTable.load(tmp_path / "table.safetensors", CPU, torch.bfloat16)
    monkeypatch.setattr(prompts, "_RESIDENT_BYTES", classes * 2 * size)  # half of what bfloat16 takes
    del tokens
    mapped = []
    grew = peak_bytes(lambda: mapped.append(PromptTable.load(tmp_path / "table.safetensors", CPU, torch.bfloat16)), CPU)
    (table,) = mapped
    found, expected = table.lookup(labels, templates), whole.lookup(labels, templates)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == torch.bfloat16 and torch.equal(found[name], expected[name])
    assert found["tokens"][:, 0].tolist() == torch.tensor([15, 398, 15, 0]).bfloat16().tolist()
    assert grew < 8e6 < 4 * classes * 2 * size  # 64 MB are in the file


def test_orders_on_bank_rows_get_those_and_their_mean_as_the_null():
    images = np.zeros(2, ORDER_DTYPE)
    images["template"] = -1
    rows = {"tokens": noise((2, 3, 4)), "null.tokens": noise((3, 4), seed=1)}
    found = prompt_conditioning(OrderBatch(0, 0, 0, 0, images), rows, None, guided=True)["tokens"]
    torch.testing.assert_close(found, torch.cat([rows["null.tokens"].expand(2, -1, -1), rows["tokens"]]))


@pytest.mark.parametrize("guided", [False, True])
def test_orders_of_mixed_labels_get_both_prompts_mixed(model, tmp_path, guided):
    table = PromptTable.load(encode_prompts(model, CLASSES, TEMPLATES, tmp_path), CPU, torch.float32)
    images = np.zeros(2, ORDER_DTYPE)
    images["label"], images["label_b"], images["label_mix"], images["template"] = [0, 2], [1, 2], [0.25, 0.0], 1
    found = prompt_conditioning(OrderBatch(0, 0, 0, 0, images), {}, table, guided)["tokens"]
    of = table.embeddings["tokens"][:, 1]
    expected = torch.stack([0.75 * of[0] + 0.25 * of[1], of[2]])
    torch.testing.assert_close(
        found, torch.cat([table.null["tokens"].expand_as(expected), expected]) if guided else expected
    )

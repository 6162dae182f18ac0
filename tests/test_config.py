"""The configuration: every mistake is one sentence with the file, the key and what would work."""

import pytest
import yaml

from streamaug.config import Config, bundled, load, parse
from streamaug.errors import ConfigError

MINIMAL = "prior: {}\n"


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text, "my.yaml", overrides)
    return str(caught.value)


def test_bundled_configurations_load():
    assert "digits" in bundled()
    for name in bundled():
        assert isinstance(load(name, ["data.root=."] if name == "folder" else []), Config)


def test_digits_has_the_ratio_on_exactly_one_line():
    from importlib.resources import files

    lines = (files("streamaug.configs") / "digits.yaml").read_text().splitlines()
    assert [line.strip() for line in lines].count("ratio: 0.5") == 1


def test_an_unknown_key_names_the_nearest():
    message = refusal("prior: {}\nstream: {batch_sise: 3}")
    assert "my.yaml: unknown key 'stream.batch_sise' (did you mean 'batch_size'?)" in message


def test_an_unknown_key_in_a_recipe_names_its_place():
    assert "unknown key 'recipes.0.dept' (did you mean 'depth'?)" in refusal(
        "prior: {}\nrecipes: [{kind: noise, dept: [0, 1]}]"
    )


@pytest.mark.parametrize("ratio", ["1.0", "-0.1", "1.5"])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    message = refusal(f"prior: {{}}\nloader: {{ratio: {ratio}}}")
    assert "loader.ratio" in message
    assert ratio in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "empty"),
        ("- a\n- b\n", "expected sections"),
        ("just words", "expected sections"),
        ("a: [1, 2", "not YAML"),
        ("model: !!python/object/apply:os.system ['true']", "no Python tags (line 1)"),
        ("seed: zero\nprior: {}", "seed: input should be a valid integer"),
        ("prior: {}\nrecipes: [{kind: noise, depth: [0.5, 0.2]}]", "recipes.0: depth is a range"),
        ("prior: {}\nrecipes: []", "recipes"),
        ("prior: {}\nrecipes: [{kind: noise, weight: 0}]", "every recipe has weight 0"),
        ("seed: 1", "no generator"),
        ("prior: {}\ndata: {source: folder}", "needs root"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(text, part):
    assert part in refusal(text)


def test_environment_variables_are_expanded_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert parse("model: {path: '${MODELS}/sd'}").model.path == tmp_path / "sd"
    assert str(parse("model: {path: '${UNSET_HERE:-/else}/sd'}").model.path) == "/else/sd"
    assert "UNSET_HERE is not set" in refusal("model: {path: '${UNSET_HERE}/sd'}")


def test_overrides_apply_after_the_file():
    config = parse("prior: {}\nrecipes: [{kind: noise}]", "x", ["loader.ratio=0.25", "recipes.0.depth=[0.1, 0.2]"])
    assert config.loader.ratio == 0.25
    assert config.recipes[0].depth == (0.1, 0.2)


@pytest.mark.parametrize("override", ["ratio", "=3", "recipes.7.depth=[0, 1]", "a=[1"])
def test_an_unusable_override_is_named(override):
    assert f"--set {override}" in refusal("prior: {}\nrecipes: [{kind: noise}]", override)


def test_overrides_may_be_a_mapping_and_are_no_string(tmp_path):
    root = tmp_path / "a=b: [c"
    config = load("folder", {"data.root": root, "loader.ratio": 0.25, "recipes.0.weight": 2})
    assert (config.data.root, config.loader.ratio, config.recipes[0].weight) == (root, 0.25, 2)
    with pytest.raises(ConfigError, match=r"data.rot"):
        load("folder", {"data.rot": "x"})
    with pytest.raises(ConfigError, match=r"a list of such strings, or a mapping, is expected: \['data.root=x'\]"):
        load("folder", "data.root=x")


def test_settings_in_the_place_of_a_file_are_told_where_they_go():
    with pytest.raises(ConfigError, match=r"a YAML file or a bundled name .*got a dict; single settings go into overr"):
        load({"data.root": "x"})


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "digits.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"no such file \(did you mean 'digits.yaml'\?\)"):
        load(tmp_path / "digit.yaml")


def test_a_folder_and_a_binary_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="a folder"):
        load(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not a text file"):
        load(tmp_path / "x.yaml")


def test_the_printed_configuration_loads_to_the_same(tmp_path):
    config = load("digits", ["loader.ratio=0.25"])
    assert Config.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_the_digest_of_sections_ignores_the_others():
    one, other = load("digits"), load("digits", ["train.steps=7"])
    assert one.digest("model", "bank") == other.digest("model", "bank")
    assert one.digest() != other.digest()

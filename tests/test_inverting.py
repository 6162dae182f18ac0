"""Inverting by configuration: every method from YAML, a data set of one's own, and banks that people have edited."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import streamaug as sa
from streamaug.bank import LatentBank
from streamaug.bank.edit import drop, merge
from streamaug.cli import app
from streamaug.config import Config, load
from streamaug.errors import BankError, ConfigError, DataError, MismatchError, UsageError
from streamaug.inversion import run
from streamaug.inversion.methods import methods_for
from streamaug.inverting import bank_path, estimate_configured, invert_configured
from streamaug.preparation import prepare
from streamaug.progress import Silent
from streamaug.stream import Stream

FASHION = "/usr/share/datasets/fashion-mnist"
SMALL = [
    "prior.steps=2",
    "prior.channels=[8, 16]",
    "prior.labels=all",
    "judge.enabled=false",
    "judge.features=false",
    "model.steps=2",
    "model.compile=false",
    "data.shots=2",
    "bank.ddim.iterations=1",
    "bank.embedding.visits=4",
    "stream.producers=1",
    "stream.batch_size=10",
    "stream.backend=local",
]
RECIPES = {
    "encode": "{kind: noise}",
    "ddim": "{kind: latent_noise}",
    "embedding": "{kind: embedding, guidance: [2, 2]}",
    "prompt": "{kind: prompt, guidance: [1.5, 1.5]}",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def settings(cache: Path, *overrides: str) -> Config:
    return load("digits", [*SMALL, f"cache={cache}", *overrides])


@pytest.mark.parametrize("method", RECIPES)
def test_a_stream_runs_from_each_method_alone(cache, method):
    config = settings(cache, f"bank.methods=[{method}]", f"recipes=[{RECIPES[method]}]")
    with Stream.from_prepared(prepare(config)) as stream:
        assert len(stream.take(20).images) == 20


def test_one_bank_holds_all_methods_and_serves_a_mixture_of_recipes(cache):
    methods = ["encode", "ddim", "embedding"]
    recipes = ", ".join([*RECIPES.values(), "{kind: interpolate, pairs: nearest}", "{kind: interpolate, pairs: mixed}"])
    config = settings(cache, f"bank.methods=[{', '.join(methods)}]", f"recipes=[{recipes}]")
    prepared = prepare(config)
    assert list(prepared.bank.parts) == methods
    with Stream.from_prepared(prepared) as stream:
        batch = stream.take(150)
    assert (batch.label_mix > 0).any() and (
        batch.labels[batch.label_mix > 0] != batch.label_b[batch.label_mix > 0]
    ).all()


@pytest.mark.parametrize(
    ("methods", "recipe", "missing"),
    [
        ("[encode]", "{kind: latent_noise}", "add ddim"),
        ("[ddim]", "{kind: noise}", "add encode"),
        ("[encode]", "{kind: noise, conditioning: embedding}", "add embedding"),
        ("[prompt]", "{kind: embedding}", "add embedding"),
    ],
)
def test_a_recipe_whose_rows_no_method_writes_is_refused(cache, methods, recipe, missing):
    with pytest.raises(ConfigError, match=missing):
        prepare(settings(cache, f"bank.methods={methods}", f"recipes=[{recipe}]"))


def test_the_score_of_each_row_is_stored_when_asked_for(cache):
    config = settings(cache, "bank.score=true", "judge.enabled=true", "judge.steps=2")
    scores = invert_configured(config, progress=Silent()).row_array("encode.score")
    assert ((scores >= 0) & (scores <= 1)).all()


def test_classes_with_one_image_are_varied_by_noise_and_named(cache, caplog):
    with caplog.at_level("WARNING", logger="streamaug"):
        prepare(settings(cache, "data.shots=1", "recipes=[{kind: interpolate}]"))
    assert "one image" in caplog.text and "0, 1, 2" in caplog.text


def test_class_names_alone_serve_a_model_that_knows_them(cache, tmp_path):
    prior = prepare(settings(cache)).model.path
    names = ", ".join(f"'{digit}'" for digit in range(10))
    config = settings(
        cache,
        f"data={{source: classes, class_names: [{names}], image_size: 8, channels: 1}}",
        f"model.path={prior}",
        "bank.methods=[prompt]",
        "recipes=[{kind: prompt}]",
    )
    prepared = prepare(config)
    assert prepared.bank.num_rows == 0
    with Stream.from_prepared(prepared) as stream:
        assert set(stream.take(40).labels) == set(range(10))
    with pytest.raises(ConfigError, match="nothing to invert"):
        prepare(config.model_copy(update={"bank": settings(cache).bank}))


@pytest.mark.matrix
@pytest.mark.skipif(not Path(FASHION).is_dir(), reason=f"{FASHION} is not there (Debian: dataset-fashion-mnist)")
def test_all_methods_run_on_fashion_mnist(cache):
    methods = {"[encode,ddim,embedding]": ["encode", "ddim", "embedding"], "[prompt]": ["prompt"]}
    for given, kinds in methods.items():
        recipes = ",".join(RECIPES[kind] for kind in kinds)
        overrides = [*SMALL, f"cache={cache}", "data.validation=100", f"bank.methods={given}", f"recipes=[{recipes}]"]
        with Stream.from_prepared(prepare(load("fashion", overrides))) as stream:
            assert stream.take(60).images.shape == (60, 1, 16, 16)


@pytest.mark.parametrize("kind", ["pairs", "arrays", "torch"])
def test_a_data_set_of_ones_own_is_inverted(cache, tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8)
    if kind == "torch":
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(pixels)[:, None], torch.arange(6) % 2)
    else:
        images = [Image.fromarray(each) for each in pixels] if kind == "pairs" else list(pixels)
        dataset = [(image, label % 2) for label, image in enumerate(images)]
    config = settings(cache, "prior.labels=false")
    bank = sa.invert(dataset, config, path=tmp_path / "bank")
    assert bank.path == tmp_path / "bank" and bank.labels.tolist() == [0, 1] * 3
    expected = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    torch.testing.assert_close(bank.tensor("latent").float(), expected, atol=1e-3, rtol=0)


def test_a_bank_whose_rows_were_dropped_is_trained_with_as_it_is(cache, tmp_path):
    config = settings(cache, f"bank.path={tmp_path / 'bank'}", "recipes=[{kind: noise, classes: ['1']}, {kind: noise}]")
    whole = invert_configured(config, progress=Silent())
    named = tmp_path / "unwanted.txt"
    named.write_text(whole.source_hash(0) + "\n")
    drop(tmp_path / "bank", hashes=named)
    prepared = prepare(config)
    assert prepared.bank.num_rows == whole.num_rows - 1 and prepared.bank.digest != whole.digest
    with Stream.from_prepared(prepared) as stream:
        assert len(stream.take(30).images) == 30
    assert invert_configured(config, progress=Silent()).digest == whole.digest


def test_an_edited_bank_of_other_settings_is_refused(cache, tmp_path):
    config = settings(cache, f"bank.path={tmp_path / 'bank'}", "bank.methods=[ddim]", "recipes=[{kind: latent_noise}]")
    bank = invert_configured(config, progress=Silent())
    (tmp_path / "hashes").write_text(bank.source_hash(3))
    drop(tmp_path / "bank", hashes=tmp_path / "hashes")
    other = config.bank.model_copy(update={"ddim": config.bank.ddim.model_copy(update={"iterations": 2})})
    with pytest.raises(MismatchError, match=r"'iterations': 1.*'iterations': 2"):
        prepare(config.model_copy(update={"bank": other}))


def test_a_bank_with_more_methods_than_asked_for_is_used_and_never_shortened(cache, tmp_path):
    path = f"bank.path={tmp_path / 'bank'}"
    both = invert_configured(settings(cache, path, "bank.methods=[encode, ddim]"), progress=Silent())
    assert invert_configured(settings(cache, path), progress=Silent()).digest == both.digest
    with pytest.raises(BankError, match="also holds ddim"):
        invert_configured(settings(cache, path, "data.shots=3"), progress=Silent())
    assert LatentBank.open(tmp_path / "bank").digest == both.digest


def test_a_dry_run_says_time_and_disk_and_writes_no_bank(cache, tmp_path):
    given = [option for override in [*SMALL, f"cache={cache}"] for option in ("--set", override)]
    invert = ["invert", "digits", *given, "--out", str(tmp_path / "bank")]
    result = CliRunner().invoke(app, [*invert, "--dry-run", "--set", "bank.methods=[encode, ddim]"])
    assert result.exit_code == 0, result.output
    assert "ddim: 20 images" in result.stdout and "on disk" in result.stdout
    assert not (tmp_path / "bank").exists()


def test_settings_that_change_no_byte_of_the_bank_do_not_move_it_in_the_cache(cache):
    prepared = prepare(settings(cache))

    def path(*overrides: str) -> Path:
        config = settings(cache, *overrides)
        return bank_path(config, prepared.model, prepared.labelled, methods_for(config, prepared.model, None))

    where, inverted = path(), "bank.methods=[encode, ddim]"
    for same in ("bank.device=mapped", "bank.embedding.checkpoint_every=7", "model.steps=3"):
        assert path(same) == where
    for other in ("bank.dtype=float32", inverted, "bank.shard_rows=64"):
        assert path(other) != where
    assert path(inverted, "model.steps=3") != path(inverted), "other steps make other rows"


def test_a_method_more_does_not_redo_the_others_in_the_cache(cache, monkeypatch):
    first = invert_configured(settings(cache, "bank.methods=[encode]", "data.shots=4"), progress=Silent())
    computed = []
    compute = run._compute

    def counted(method, *arguments):
        computed.append(method.part.name)
        return compute(method, *arguments)

    monkeypatch.setattr(run, "_compute", counted)
    more = settings(cache, "bank.methods=[encode,ddim]", "data.shots=4")
    done = {each.name: each.done_rows for each in estimate_configured(more, progress=Silent()).methods}
    assert done == {"encode": 40, "ddim": 0}
    computed.clear()
    second = invert_configured(more, progress=Silent())
    assert set(computed) == {"ddim"} and second.path != first.path
    assert torch.equal(second.tensor("latent"), first.tensor("latent"))
    (first.path / "index.json").unlink()  # nothing is taken from files that no index vouches for
    third = invert_configured(
        settings(cache, "bank.methods=[encode]", "data.shots=4", "bank.shard_rows=64"), progress=Silent()
    )
    assert third.path not in (first.path, second.path) and set(computed) == {"ddim"}


def test_a_bank_in_the_cache_whose_rows_were_dropped_is_trained_with_as_it_is(cache):
    config = settings(cache, "seed=5")
    whole = prepare(config).bank
    drop(whole.path, classes=["3"])
    with pytest.raises(DataError, match="classes without a bank row"):
        prepare(config)
    kept = list("012456789")
    named = f"recipes=[{{kind: noise, classes: {kept}}}, {{kind: prompt, guidance: [1.5, 1.5]}}]"
    assert prepare(settings(cache, "seed=5", named)).bank.num_rows == whole.num_rows - 2


class Lines:
    def __init__(self):
        self.phases, self.done = [], []

    def phase(self, name, total=None):
        self.phases.append((name, total))

    def advance(self, n=1, **figures):
        self.done.append((self.phases[-1][0], n, figures.get("images_per_s")))


def test_progress_counts_what_is_left_of_each_method_and_says_images_a_second(cache, tmp_path):
    path = [f"bank.path={tmp_path / 'bank'}", "bank.embedding.group_rows=5"]
    invert_configured(settings(cache, *path), progress=Silent())
    lines = Lines()
    invert_configured(settings(cache, *path, "bank.methods=[encode, embedding]"), progress=lines)
    assert lines.phases[-2:] == [
        ("inverting (encode, 20 rows are there already)", 0),
        ("inverting (embedding)", 20),
    ]
    made = [(n, rate) for phase, n, rate in lines.done if phase == "inverting (embedding)"]
    assert sum(n for n, _ in made) == 20 and all(n >= 0 for n, _ in made)
    assert len(made) > 4, "also within a group"
    assert all(rate is None or rate >= 0 for _, rate in made) and made[-1][1] is None


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("[{kind: noise, classes: ['1', '2']}]", "no recipe is for class 0, 3"),
        ("[{kind: noise}, {kind: noise, classes: ['ten']}]", "class 'ten'"),
        ("[{kind: noise}, {kind: interpolate, pairs: mixed, classes: ['1']}]", "it has one class, 1"),
    ],
)
def test_recipes_that_do_not_fit_the_classes_are_refused_before_a_generator_is_trained(tmp_path, recipes, message):
    for job in (prepare, lambda config: invert_configured(config, progress=Silent())):
        with pytest.raises(UsageError, match=message):
            job(settings(tmp_path, f"recipes={recipes}"))
    assert list(tmp_path.iterdir()) == []


def test_without_images_there_is_nothing_to_invert(tmp_path):
    config = settings(tmp_path, "data={source: classes, class_names: [a, b], image_size: 8}")
    with pytest.raises(ConfigError, match="nothing to train a prior on"):
        invert_configured(config, progress=Silent())


def test_only_classes_that_a_recipe_pairs_are_said_to_be_alone(cache, caplog):
    with caplog.at_level("WARNING", logger="streamaug"):
        prepare(settings(cache, "data.shots=1", "recipes=[{kind: interpolate, classes: ['4', '7']}, {kind: noise}]"))
    assert "varied by noise alone: 4, 7" in caplog.text


def test_banks_scored_by_different_judges_are_merged_without_scores(cache, tmp_path, caplog):
    scored = ["bank.score=true", "judge.enabled=true", "judge.steps=2"]
    for seed in (0, 1):
        invert_configured(
            settings(cache, *scored, f"seed={seed}", f"bank.path={tmp_path / str(seed)}"), progress=Silent()
        )
    with caplog.at_level("WARNING", logger="streamaug"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    both = LatentBank.open(tmp_path / "both")
    assert list(both.parts) == ["encode"] and both.num_rows > 20 and "different judges" in caplog.text


@pytest.mark.parametrize("changed", ["bank.methods=[embedding]", "recipes=[{kind: prompt}]"])
def test_a_prior_without_labels_is_not_trained_for_what_needs_them(tmp_path, changed):
    with pytest.raises(ConfigError, match=r"set prior\.labels"):
        prepare(settings(tmp_path, "prior.labels=false", changed))
    assert list(tmp_path.iterdir()) == []

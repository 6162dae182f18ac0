"""The execution plan: when compiling pays, what is measured for it, and that the answer is kept."""

import json
from types import SimpleNamespace

import pytest
import torch

from streamaug import engine
from streamaug.config import load
from streamaug.errors import ConfigError
from streamaug.preparation import prepare
from streamaug.sampling import execution
from streamaug.sampling.denoisers import base
from streamaug.sampling.execution import Execution, decide, evaluations_of, measure, repays, shapes_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def config(cache, *overrides):
    return load("digits", [f"cache={cache}", "model.steps=20", "model.compile=auto", *overrides])


def never() -> float:
    raise AssertionError("nothing needed measuring")


@pytest.mark.parametrize(
    ("evaluations", "seconds", "shapes", "expected"),
    [
        (1000, 0.03, 1, False),
        (10_000, 0.03, 1, True),
        (10_000, 0.03, 3, False),
        (100, 3.0, 1, True),
        (0, 9.0, 1, False),
    ],
)
def test_compiling_pays_when_it_saves_more_than_its_own_time(evaluations, seconds, shapes, expected):
    assert repays(evaluations, seconds, shapes) is expected


def test_the_evaluations_are_those_of_the_images_the_configuration_asks_for(tmp_path):
    made = config(
        tmp_path,
        "loader.ratio=0.5",
        "train.batch_size=64",
        "train.steps=1000",
        "stream.batch_size=32",
        "recipes=[{kind: noise, depth: [0.2, 0.4]}, {kind: noise, depth: [0.5, 0.5], weight: 3}]",
    )
    assert evaluations_of(made) == pytest.approx(1000 * (0.25 * 0.3 + 0.75 * 0.5) * 20)
    assert evaluations_of(config(tmp_path, "loader.ratio=0")) == 0


@pytest.mark.parametrize(
    ("guidance", "interval", "shapes"),
    [((1, 1), (0, 1), 1), ((2, 3), (0, 1), 1), ((2, 3), (0.2, 0.8), 2)],
)
def test_guidance_in_an_interval_is_a_second_shape(tmp_path, guidance, interval, shapes):
    recipe = f"recipes=[{{kind: noise, guidance: {list(guidance)}}}]"
    assert shapes_of(config(tmp_path, recipe, f"model.guidance_interval={list(interval)}")) == shapes


def test_guided_and_unguided_recipes_are_two_shapes(tmp_path):
    recipes = "recipes=[{kind: noise}, {kind: noise, guidance: [2, 2]}]"
    assert shapes_of(config(tmp_path, recipes)) == 2


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_for_is_not_measured(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(execution, "require_compiler", lambda: None)
    settings = config(tmp_path, f"model.compile={asked}", f"model.graph={asked}")
    assert decide(settings, GPU, "digest", never) == Execution(asked, asked)


def test_auto_captures_on_a_gpu_and_compiles_where_there_is_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "compiler", lambda: None)
    assert decide(config(tmp_path), CPU, "digest", never) == Execution(False, False)
    assert decide(config(tmp_path), GPU, "digest", never) == Execution(False, True)
    monkeypatch.setattr(execution, "compiler", lambda: "g++")
    assert decide(config(tmp_path), CPU, "slow", lambda: 60.0) == Execution(True, False)
    assert decide(config(tmp_path), CPU, "fast", lambda: 1e-6) == Execution(False, False)


def test_a_measured_decision_is_kept_so_that_a_resumed_run_gets_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "compiler", lambda: "g++")
    assert decide(config(tmp_path), CPU, "digest", lambda: 60.0).compile
    assert decide(config(tmp_path), CPU, "digest", never).compile
    (kept,) = tmp_path.glob("execution-*.json")
    assert json.loads(kept.read_text()) == {"compile": True, "evaluation_seconds": 60.0}
    assert not decide(config(tmp_path), CPU, "another", lambda: 1e-6).compile
    assert not decide(config(tmp_path, "train.steps=1"), CPU, "digest", lambda: 1e-6).compile


def test_a_graph_on_the_cpu_and_compiling_without_a_compiler_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="CUDA graphs need a GPU"):
        decide(config(tmp_path, "model.graph=true"), CPU, "digest", never)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="needs a C\\+\\+ compiler"):
        decide(config(tmp_path, "model.compile=true"), CPU, "digest", never)


@pytest.mark.parametrize("evaluations", [1, 2, 9])
def test_the_second_evaluation_is_measured_and_no_more_are_made(evaluations, monkeypatch):
    made, clock = [], [100.0]
    monkeypatch.setattr(execution, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def sample(before_evaluation):
        for evaluation in range(evaluations):
            before_evaluation()
            made.append(evaluation)
            clock[0] += 0.5 if evaluation == 0 else 0.125

    seconds = measure(sample, CPU)
    assert len(made) == min(evaluations, 2)
    assert seconds == (0.5 if evaluations == 1 else 0.125)


@pytest.fixture(scope="module")
def prepared(small_overrides):
    return prepare(load("digits", [*small_overrides, "judge.enabled=false"]))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_producer_obeys_the_plan_it_is_given_and_does_not_decide_again(prepared, compiled, monkeypatch):
    calls = []
    monkeypatch.setattr(base, "compile_network", calls.append)
    monkeypatch.setattr(execution, "decide", never)
    built = engine.build(prepared.options_for(Execution(compile=compiled, graph=compiled)))
    assert len(calls) == compiled
    assert (built.sampler.graphs is not None) == compiled


def test_the_plan_is_part_of_what_images_depend_on(prepared):
    assert prepared.plan_extra["execution"] == prepared.execution.asdict() == prepared.engine_options["execution"]


def test_the_evaluation_measured_is_one_of_the_real_network(prepared):
    built = engine.build(prepared.options_for(Execution()))
    order = prepared.planner.batch(0, prepared.planner.uniform())
    assert 0 < measure(lambda beat: built.look(order, beat), CPU) < 10

"""A loop that reacts is exact: what is said after batch k changes batch k + in_flight and none before it."""

import numpy as np
import pytest

from streamaug.errors import DataError, UsageError
from streamaug.stream import arrays
from streamaug.stream.steering import Steering, bounded

from .fakes import digest_of, images_of, listed, make_planner, make_stream, pixels_of

B, L = 8, 4


def judge(value: int) -> np.ndarray:
    return np.full(16, value, np.uint8)


def labels_by_batch(stream, batches: int) -> list[list[int]]:
    return [stream.take(B).labels.tolist() for _ in range(batches)]


def planned_labels(k: int, classes: np.ndarray | None = None) -> list[int]:
    planner = make_planner(B)
    weights = planner.uniform() if classes is None else type(planner.uniform())(1, classes)
    return planner.batch(k, weights).images["label"].tolist()


@pytest.mark.parametrize("producers", [1, 3])
@pytest.mark.parametrize("backend", ["local", "process"])
def test_feedback_on_batch_k_changes_batch_k_plus_in_flight_and_none_before(producers, backend):
    k = 2
    with make_stream(backend=backend, producers=producers, in_flight=L) as stream:
        labels = labels_by_batch(stream, k + 1)
        stream.feedback([0, 1, 2, 3], [4.0, 1.0, 1.0, 1.0])
        steering = Steering(np.ones(4))
        steering.observe(np.arange(4), np.array([4.0, 1, 1, 1]))
        labels += labels_by_batch(stream, L + 2)
    for at in range(k + L):
        assert labels[at] == planned_labels(at)
    for at in range(k + L, k + L + 3):
        assert labels[at] == planned_labels(at, steering.classes())


@pytest.mark.parametrize("producers", [1, 3])
def test_a_published_judge_judges_batch_k_plus_in_flight_and_none_before(producers):
    k = 2
    with make_stream(producers=producers, in_flight=L, judge=judge(0)) as stream:
        images = [stream.take(B) for _ in range(k + 1)]
        assert stream.publish_judge(judge(9)) == 1
        images += [stream.take(B) for _ in range(L + 2)]
    planner = make_planner(B)
    for at, batch in enumerate(images):
        order = planner.batch(at, planner.uniform())
        state = judge(9 if at >= k + L else 0).tobytes()
        for image, made in zip(order.images, batch.images, strict=True):
            assert (made == pixels_of(digest_of(image, order.start, state), (1, 8, 8))).all(), at


def test_every_version_is_used_exactly_although_judges_are_published_faster_than_batches_are_made():
    def run(producers: int, backend: str) -> list[tuple]:
        delivered = []
        options = {"seconds": 0.003 if backend == "process" else 0}
        with make_stream(backend=backend, producers=producers, judge=judge(0), engine_options=options) as stream:
            for step in range(40):
                delivered += images_of(stream.take(5))
                for times in range(step % 4):
                    stream.publish_judge(judge((7 * step + times) % 256))
        return delivered

    alone = run(1, "local")
    assert run(1, "process") == run(2, "process") == alone


def test_the_same_feedback_gives_the_same_images_whatever_the_timing():
    def run(**options) -> list[tuple]:
        with make_stream(**options) as stream:
            delivered = []
            for step in range(30):
                batch = stream.take(6)
                delivered += images_of(batch)
                stream.feedback(batch.labels, 1.0 + batch.labels * (step % 3))
            return delivered

    reject = {"reject": 0.3}
    alone = run(backend="local", engine_options=reject)
    assert run(producers=2, engine_options=reject | {"seconds": 0.005}) == alone


def test_feedback_that_says_nothing_changes_nothing():
    with make_stream(backend="local") as stream:
        alone = listed(stream, [40])
    with make_stream(backend="local") as stream:
        said = []
        for _ in range(5):
            said += images_of(stream.take(8))
            stream.feedback([], [])
            stream.feedback([1, 2], [float("nan"), float("inf")])
            stream.feedback([0, 1, 2, 3], [2.0, 2.0, 2.0, 2.0])
        assert [image[0] for image in said] == [image[0] for image in alone]
        assert said == alone


def test_feedback_takes_tensors():
    import torch

    with make_stream(backend="local") as stream:
        stream.feedback(torch.tensor([0, 1]), torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([5, -1]))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 1], [1.0]), UsageError, r"lengths \[2, 1\]"),
        (([0, 1], [1.0, 1.0], [3]), UsageError, r"lengths \[2, 2, 1\]"),
        (([0, 7], [1.0, 1.0]), DataError, "class 7: the classes are 0 to 3"),
    ],
)
def test_feedback_that_cannot_be_meant_is_refused(arguments, error, text):
    with make_stream(backend="local") as stream, pytest.raises(error, match=text):
        stream.feedback(*arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_losses_have_the_dtype_that_training_has(dtype):
    import torch

    losses = torch.tensor([0.5, 2.0], dtype=getattr(torch, dtype), requires_grad=True)
    for given in (losses, list(losses), losses.reshape(2, 1)):
        labels, found = arrays.feedback(torch.tensor([0, 3], dtype=torch.int8), given, None, 4)
        assert labels.tolist() == [0, 3] and found.tolist() == [0.5, 2.0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("labels", "losses", "message"),
    [
        (["cat", "dog"], [1, 2], r"feedback's labels: needs whole numbers .*, got \['cat', 'dog'\]"),
        ([0.5, 1], [1, 2], r"feedback's labels: needs whole numbers .*, got \[0.5, 1\]"),
        ([np.nan, 1], [1, 2], "feedback's labels: needs whole numbers"),
        ([[0], [1, 2]], [1, 2, 3], "feedback's labels: needs whole numbers"),
        (None, None, "feedback's labels: needs whole numbers .*, got None"),
        ([0, 1], ["high", "low"], "feedback's losses: needs numbers"),
        ([0, 1], np.array([1j, 2]), "feedback's losses: needs numbers"),
    ],
)
def test_feedback_that_is_no_number_is_refused_and_not_rounded(labels, losses, message):
    with pytest.raises(UsageError, match=message):
        arrays.feedback(labels, losses, None, 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weights", [["a"] * 4, [[1, 2], [3]], [1e308] * 4, [np.nan] * 4, 3, [0] * 4, [1] * 3])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(UsageError, match="class_weights: needs"):
        arrays.weights("class_weights", weights, 4)


def test_a_judge_of_another_size_or_without_a_first_one_is_refused():
    with (
        make_stream(backend="local", judge=judge(0)) as stream,
        pytest.raises(UsageError, match="flat uint8 array of 16 bytes"),
    ):
        stream.publish_judge(np.zeros(17, np.uint8))
    with make_stream(backend="local") as stream, pytest.raises(UsageError, match="without a judge_state"):
        stream.publish_judge(judge(1))


# The policy.


def test_class_weights_follow_the_running_loss_within_bounds():
    steering = Steering(np.ones(4))
    for _ in range(50):
        steering.observe(np.arange(4), np.array([100.0, 1.0, 1.0, 0.0]))
    shares = steering.classes()
    assert shares.sum() == pytest.approx(1)
    assert shares[0] == pytest.approx(2 / 4) and shares[3] == pytest.approx(0.5 / 4)
    assert shares[1] == shares[2] > shares[3]


def test_a_class_that_was_never_seen_keeps_its_share_and_a_class_of_weight_zero_stays_out():
    steering = Steering(np.array([1.0, 1.0, 1.0, 0.0]))
    steering.observe(np.array([0, 1]), np.array([1.5, 0.5]))
    shares = steering.classes()
    assert shares[2] == pytest.approx(1 / 3)
    assert shares[3] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("losses", [[0, 0, 5], [-1, -1, 10], [0, 0, 0], [-1, -2, -3], [3e38, 1, 0]])
def test_whatever_the_losses_are_shares_sum_to_one_within_bounds(losses):
    steering = Steering(np.array([1.0, 1.0, 0.0]))
    steering.observe(np.arange(3), np.array(losses, float))
    shares = steering.classes() / steering.classes().sum()
    assert shares[2] == 0
    assert ((shares[:2] >= 0.25) & (shares[:2] <= 1)).all()


def test_delivered_classes_follow_the_target_when_acceptance_differs():
    acceptance = np.array([0.9, 0.45, 0.6, 0.9])
    steering = Steering(np.ones(4))
    for _ in range(200):
        asked = 64 * steering.classes() / steering.classes().sum()
        steering.consumed(asked, asked * acceptance)
    delivered = steering.classes() * acceptance
    assert delivered / delivered.sum() == pytest.approx(np.full(4, 0.25), abs=0.01)


def test_steering_survives_its_state():
    steering = Steering(np.array([1.0, 2.0, 3.0]))
    steering.observe(np.array([0, 2]), np.array([0.3, 0.7]))
    steering.consumed(np.array([5, 6, 7]), np.array([5, 3, 1]))
    again = Steering.from_state(steering.state_dict())
    assert (again.classes() == steering.classes()).all()
    for one in (steering, again):
        one.observe(np.array([1, 2]), np.array([0.9, 0.1]))
        one.consumed(np.array([9, 9, 9]), np.array([1, 9, 9]))
    assert (again.classes() == steering.classes()).all()


@pytest.mark.parametrize("seed", range(20))
def test_bounded_shares_sum_to_one_keep_their_bounds_and_their_proportions(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    base, wanted = rng.random(count) + 0.01, rng.random(count) ** 4
    shares = bounded(wanted, base, 0.5, 2.0)
    base = base / base.sum()
    assert shares.sum() == pytest.approx(1)
    assert (shares >= 0.5 * base - 1e-12).all() and (shares <= 2 * base + 1e-12).all()
    free = (shares > 0.5 * base * (1 + 1e-9)) & (shares < 2 * base * (1 - 1e-9))
    scale = shares[free] / wanted[free]
    assert scale == pytest.approx(np.full(free.sum(), scale.mean() if free.any() else 0))

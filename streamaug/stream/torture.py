"""Chaos on your own machine: `python -m streamaug.stream.torture --minutes 5`.

Runs streams without a model in real processes; kills, stops and terminates their producers at random moments, lets them
raise, breaks, closes, forgets, forks, resumes and kills the trainer, and compares what was delivered, image for image
and bit for bit, with an undisturbed run. Linux only.
"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from streamaug.errors import ProducerError
from streamaug.stream.footprint import Footprint, footprint, memory_mb, running, until
from streamaug.stream.rehearsal import Image, images_of, make_stream
from streamaug.stream.ring.memory import SHM_FOLDER
from streamaug.stream.stream import Stream

KINDS = ("fixed judge", "feedback", "live judge")
GONE_SECONDS = 10.0  # five times what is promised: this machine may be busy
DEEDS = (
    *("producer killed", "producer terminated", "producer stopped", "producer raised", "trainer killed"),
    *("loop broken off", "stream forgotten", "went back", "state loaded", "take interrupted", "pause", "fork"),
)
_STUCK_SECONDS = 180  # a call that takes longer is reported with all stacks, and ends the program
_MEMORY_MB = 48.0  # growth after the first rounds beyond which memory counts as leaked


@dataclass(frozen=True)
class Run:
    """What one run is made of: the same, whatever is done to it."""

    seed: int
    kind: str
    reject: float
    seconds: float  # a batch takes
    options: dict = field(default_factory=dict)  # of the engine, besides

    @classmethod
    def draw(cls, seed: int, kind: str, options: dict) -> "Run":
        rng = np.random.default_rng(seed)
        return cls(seed, kind, float(rng.choice([0.0, 0.3, 0.6])), float(rng.uniform(0.001, 0.01)), options)

    def open(
        self,
        disturbed: bool,
        producers: int = 1,
        memory: str = "auto",
        method: str = "auto",
        once: str | None = None,
    ) -> Stream:
        """The stream; undisturbed it is a thread of this process, and as fast as it can be."""
        engine: dict[str, Any] = {"reject": self.reject, **self.options}
        if disturbed:
            engine |= {"seconds": self.seconds, "slow_every": 60, "slow_seconds": 0.3}
            engine |= {} if once is None else {"raise_at": 20 + self.seed % 100, "once": once}
        return make_stream(
            judge=np.zeros(16, np.uint8) if self.kind == "live judge" else None,
            seed=self.seed,
            engine_options=engine,
            backend="process" if disturbed else "local",
            producers=producers,
            memory=memory,
            start_method=method,
            stall_timeout=0.4,
            hang_timeout=0.8,
            max_restarts=1000,
        )

    def step(self, stream: Stream, number: int) -> list[Image]:
        """One training step: some images, often across batches; what the classifier says; at times a new judge."""
        rng = np.random.default_rng([self.seed, number])
        batch = stream.take(int(rng.integers(1, 30)))
        if self.kind != "fixed judge":
            stream.feedback(batch.labels, 0.5 + batch.labels * rng.random())
        if self.kind == "live judge" and number % 4 == 1:
            stream.publish_judge(rng.integers(0, 256, 16, np.uint8))
        return images_of(batch)

    def undisturbed(self, steps: int) -> list[list[Image]]:
        with self.open(disturbed=False) as stream:
            return [self.step(stream, number) for number in range(steps)]


class Tormentor:
    """A thread that sends signals to the producers of whatever stream it is shown."""

    def __init__(self, rng: np.random.Generator, done: Counter):
        self.stream: Stream | None = None
        self.seen: set[int] = set()  # all producers there ever were
        self._rng = rng
        self._done = done
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tormentor", daemon=True)

    def __enter__(self) -> "Tormentor":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(self._rng.uniform(0.0, 2.0)):
            pids = self.stream.producer_pids if self.stream is not None else []
            self.seen |= set(pids)
            if pids:
                self._torment(int(self._rng.choice(pids)))

    def _torment(self, pid: int) -> None:
        with _held(pid) as producer:
            if producer is None or self.stream is None or pid not in self.stream.producer_pids:
                return  # it ended meanwhile, and the number may be somebody else's now
            what = str(self._rng.choice(["killed", "killed", "killed", "terminated", "stopped"]))
            self._done[f"producer {what}"] += 1
            if what == "stopped":
                _send(producer, signal.SIGSTOP)
                self._ends.wait(self._rng.uniform(0.05, 1.6))  # up to twice hang_timeout
                _send(producer, signal.SIGCONT)
            else:
                _send(producer, signal.SIGKILL if what == "killed" else signal.SIGTERM)


@contextlib.contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """A descriptor of the process, which its number cannot be mistaken with; None when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    yield fd
    os.close(fd)


def _send(producer: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(producer, number)


class Interrupted(BaseException):
    """What a signal handler of the trainer raises in the middle of `take`."""


class Trainer:
    """Trains while producers are tormented, and does to the stream itself all that a trainer may do."""

    ACTIONS = ("loop broken off", "stream forgotten", "went back", "state loaded", "take interrupted", "pause", "fork")

    def __init__(self, run: Run, producers: int, rng: np.random.Generator, tormentor: Tormentor, done: Counter):
        self.images: list[list[Image]] = []  # by step
        self.undone: list[tuple[int, list[list[Image]]]] = []  # a step, and the images from there to where it went back
        self._run = run
        self._producers = producers
        self._rng = rng
        self._tormentor = tormentor
        self._done = done
        self._saved: tuple[int, dict] = (0, {})  # a step and the state before it

    def train(self, until: float) -> None:
        """Until that time on the monotonic clock, and 20 steps at least."""
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            self._once = os.path.join(folder, "raised")
            stream = self._open(None)
            try:
                while time.monotonic() < until or len(self.images) < 20:
                    state = stream.state_dict()
                    try:
                        stream = self._disturb(stream, state)
                        state = stream.state_dict()
                        self.images.append(self._step(stream))
                    except ProducerError as error:
                        if "the weights are rotten" not in str(error):
                            raise
                        self._done["producer raised"] += 1
                        stream.close()
                        stream = self._open(state)
            finally:
                self._tormentor.stream = None
                stream.close()

    def _open(self, state: dict | None) -> Stream:
        memory = str(self._rng.choice(["memfd", "shm", "file"] if os.path.isdir(SHM_FOLDER) else ["memfd", "file"]))
        producers = self._producers or int(self._rng.integers(1, 4))
        method = str(self._rng.choice(["spawn", "forkserver"]))
        stream = self._run.open(disturbed=True, producers=producers, memory=memory, method=method, once=self._once)
        if state is not None:
            stream.load_state_dict(state)
        self._tormentor.stream = stream
        return stream

    def _disturb(self, stream: Stream, state: dict) -> Stream:
        """Sometimes do something; returns the stream to go on with."""
        number = len(self.images)
        if number % 25 == 0:
            self._saved = number, state
        if self._rng.random() > 0.08:
            return stream
        action = str(self._rng.choice(self.ACTIONS))
        self._done[action] += 1
        if action == "loop broken off":
            stream.close()
            return self._open(state)
        if action == "stream forgotten":
            self._tormentor.stream = None
            return self._open(state)  # the caller's name for the old one goes when it takes this one
        if action == "went back":
            number, saved = self._saved
            stream.load_state_dict(saved)
            self.undone.append((number, self.images[number:]))
            del self.images[number:]
        elif action == "state loaded":
            stream.load_state_dict(state)
        elif action == "take interrupted":
            self._interrupt(stream)
        elif action == "pause":
            time.sleep(self._rng.uniform(0, 0.5))
        else:
            _fork_and_close(stream)
        return stream

    def _interrupt(self, stream: Stream) -> None:
        """Interrupt a long call of take, which then has no effect."""
        old = signal.signal(signal.SIGALRM, _raise_interrupted)
        state = stream.state_dict()
        try:
            signal.setitimer(signal.ITIMER_REAL, self._rng.uniform(0.001, 0.1))
            stream.take(10_000)
        except Interrupted:
            return
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, old)
        stream.load_state_dict(state)

    def _step(self, stream: Stream) -> list[Image]:
        return self._run.step(stream, len(self.images))


def _raise_interrupted(signum: int, frame: object) -> None:
    raise Interrupted


def _fork_and_close(stream: Stream) -> None:
    """What a DataLoader worker amounts to: it inherits everything and may end nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it forks beside threads, and uses none
        child = os.fork()
    if child == 0:
        stream.close()
        os._exit(0)
    os.waitpid(child, 0)


# A trainer that is killed.


def kill_a_trainer(run: Run, producers: int, rng: np.random.Generator) -> list[list[Image]]:
    """Run it in a process of its own, SIGKILL that, see that nothing is left, go on from its last state."""
    command = [sys.executable, "-m", __spec__.name, "--victim", json.dumps(asdict(run)), "--producers", str(producers)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert victim.stdout is not None
    with victim, victim.stdout as output:
        pids = json.loads(output.readline())
        try:
            time.sleep(rng.uniform(0, 4))
        finally:
            victim.kill()
        lines = [line for line in output if line.endswith("\n")]
    until(lambda: not any(running(pid) for pid in pids), GONE_SECONDS, "producers of a killed trainer are running")
    images = [[(*fields[:-1], bytes.fromhex(fields[-1])) for fields in json.loads(line)["images"]] for line in lines]
    with run.open(disturbed=True, producers=producers) as stream:
        if lines:
            stream.load_state_dict(json.loads(lines[-1])["state"])
        return images + [run.step(stream, number) for number in range(len(images), len(images) + 20)]


def be_the_victim(run: Run, producers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who kills it
    with run.open(disturbed=True, producers=producers) as stream:
        stream.start()
        until(lambda: len(stream.producer_pids) == producers, GONE_SECONDS, "not every producer was started")
        print(json.dumps(stream.producer_pids), flush=True)
        for number in range(10**9):
            images = [(*fields, pixels.hex()) for *fields, pixels in run.step(stream, number)]
            print(json.dumps({"images": images, "state": stream.state_dict()}), flush=True)


# All of it.


@dataclass
class Report:
    rounds: int = 0
    images: int = 0
    done: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False  # by Ctrl-C: the rounds before it count

    @property
    def exit_code(self) -> int:
        if self.failures:
            return 1
        return 128 + signal.SIGINT if self.interrupted else 0

    def verdict(self) -> str:
        deeds = ", ".join(f"{what} {count}" for what, count in self.done.most_common())
        lines = [f"{_counted(self.rounds, 'round')}, {self.images:,} images. What was done: {deeds or 'nothing'}."]
        if missing := [what for what in DEEDS if not self.done[what]]:
            lines.append(f"What so short a time left out: {', '.join(missing)}.")
        lines += self.failures
        if self.failures:
            return "\n".join([*lines, "verdict: FAILED"])
        if self.interrupted:
            lines.append("Interrupted: only whole rounds count.")
        if not self.images:
            return "\n".join([*lines, "verdict: none, no round was ended"])
        return "\n".join([*lines, "verdict: every image as in the undisturbed run, and nothing left behind"])


def torture(
    minutes: float,
    seed: int,
    producers: int = 0,
    options: dict | None = None,
    round_seconds: float = 8.0,
    say: Callable[[str], None] = print,
) -> Report:
    """Rounds of chaos for so many minutes. producers: 0 draws 1 to 3; options: of the engine (`HashEngine`)."""
    report = Report()
    Run.draw(seed, KINDS[2], {}).undisturbed(3)  # imports, caches
    _open_and_close()
    before, memory_before = footprint(), 0.0
    ends = time.monotonic() + 60 * minutes
    try:
        while time.monotonic() < ends and not report.failures:
            number = report.rounds
            run = Run.draw(seed + number, KINDS[number % 3], options or {})
            _play(run, producers, min(time.monotonic() + round_seconds, ends), report, say)
            if (after := _settled(before)) != before:
                report.failures.append(f"round {number} left something behind: {before} before it, {after} after it")
            if number == 2:
                memory_before = memory_mb()
            elif memory_before and memory_mb() - memory_before > _MEMORY_MB:
                report.failures.append(f"round {number}: memory grew from {memory_before:.0f} to {memory_mb():.0f} MB")
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def _play(run: Run, producers: int, until_seconds: float, report: Report, say: Callable[[str], None]) -> None:
    """One round: a run under chaos, at times with a trainer that is killed, compared with itself undisturbed."""
    number, done = report.rounds, Counter[str]()
    rng = np.random.default_rng([run.seed, 1])
    images: list[list[Image]] = []
    undone: list[tuple[int, list[list[Image]]]] = []
    try:
        if number % 4 == 1 and run.kind != "live judge":  # whose state is not JSON
            images = kill_a_trainer(run, producers or 2, rng)
            done["trainer killed"] += 1
        else:
            with Tormentor(np.random.default_rng([run.seed, 2]), done) as tormentor:
                trainer = Trainer(run, producers, rng, tormentor, done)
                trainer.train(until_seconds)
                images, undone = trainer.images, trainer.undone
            until(lambda: not any(map(running, tormentor.seen)), GONE_SECONDS, "producers are still running")
    except Exception as error:
        report.failures.append(f"round {number} ({run}): {type(error).__name__}: {error}")
    parts = [*undone, (0, images)]
    expected = run.undisturbed(max(first + len(part) for first, part in parts))
    differences = (_first_difference(part, expected, first) for first, part in parts)
    if difference := next(filter(None, differences), None):
        report.failures.append(f"round {number} ({run}): {difference}")
    count = sum(map(len, images))
    report.rounds, report.images = number + 1, report.images + count
    report.done.update(done)
    deeds = ", ".join(f"{what} {times}" for what, times in sorted(done.items()))
    outcome = "FAILED" if report.failures else "the same"
    say(f"round {number}: {run.kind}, {len(images)} steps, {count:,} images; {deeds or 'nothing'}: {outcome}")


def _settled(before: Footprint) -> Footprint:
    """What is held once it is as little as before, or after GONE_SECONDS."""
    ends = time.monotonic() + GONE_SECONDS
    while (now := footprint()) != before and time.monotonic() < ends:
        time.sleep(0.02)
    return now


def _open_and_close() -> None:
    with make_stream(memory="file") as stream:
        stream.take(1)


def _first_difference(images: list[list[Image]], expected: list[list[Image]], first: int) -> str | None:
    """images: of steps `first` and up; expected: of all steps."""
    for step, got in enumerate(images, first):
        if got != (wanted := expected[step]):
            same = ids(got) == ids(wanted)
            what = "the same ids with other contents" if same else f"ids {ids(got)}, not {ids(wanted)}"
            return f"step {step} delivered {what}"
    return None


def ids(images: list[Image]) -> list[int]:
    return [image[0] for image in images]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m streamaug.stream.torture", description=__doc__)
    parser.add_argument("--minutes", type=_minutes, default=5.0, help="how long, 5 unless told")
    parser.add_argument("--seed", type=int, default=None, help="of the chaos; drawn and printed unless told")
    parser.add_argument("--producers", type=_producers, default=0, help="how many; 1 to 3, at random, unless told")
    parser.add_argument("--victim", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.victim:
        be_the_victim(Run(**json.loads(chosen.victim)), chosen.producers)
        return 0
    if sys.platform != "linux":
        print("This needs Linux: it reads /proc and holds processes by descriptor.", file=sys.stderr)
        return 2
    seed = int.from_bytes(os.urandom(3)) if chosen.seed is None else chosen.seed
    logging.getLogger("streamaug").setLevel(logging.ERROR)  # that producers die is no news here
    producers = _counted(chosen.producers, "producer") if chosen.producers else "1 to 3 producers"
    print(f"seed {seed}, {producers}, {_counted(chosen.minutes, 'minute')}", flush=True)

    def say(line: str) -> None:
        faulthandler.dump_traceback_later(_STUCK_SECONDS, exit=True)  # armed anew by every round
        print(line, flush=True)

    faulthandler.dump_traceback_later(_STUCK_SECONDS, exit=True)
    report = torture(chosen.minutes, seed, chosen.producers, say=say)
    faulthandler.cancel_dump_traceback_later()
    print(report.verdict(), flush=True)
    return report.exit_code


def _minutes(text: str) -> float:
    if not 0 < (minutes := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"more than 0 minutes are needed, got {text}")
    return minutes


def _producers(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"0 draws 1 to 3, other numbers are positive; got {text}")
    return number


def _counted(number: float, thing: str) -> str:
    return f"{number:g} {thing}" if number == 1 else f"{number:g} {thing}s"


if __name__ == "__main__":
    sys.exit(main())

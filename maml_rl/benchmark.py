"""Train and test the methods of the paper's comparison side by side, each on the same budget.

maml         the meta-policy
pretrained   the same trainer without inner step, new tasks in every batch; fine-tuned in the test
oracle       that, with the task in the observation; no gradient step
random       the initial policy, fine-tuned in the test

No method has a trainer of its own: they differ in `adaptation.inner_steps`,
`policy.observe_task` and `iterations`, and in what a benchmark's `settings_of` says.
"""

from __future__ import annotations

import contextvars
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from envs.family import TaskFamily
from maml_rl.assess import (
    NOT_OF_THE_METHOD,
    BrokenDown,
    Subject,
    Tester,
    Trial,
    common_alpha,
    load_subject,
    trials_here,
    words_for,
)
from maml_rl.benchmark_file import Benchmark, with_own_settings
from maml_rl.comparison import MAML, METHODS, ORACLE, PRETRAINED, RANDOM, Method
from maml_rl.config import Experiment, as_tree
from maml_rl.errors import CheckpointError, InputError, RunStopped
from maml_rl.evaluate import Evaluation
from maml_rl.loop import Show, Watcher
from maml_rl.runs import Row, RunFolder, begun_from
from maml_rl.signals import stop_requests
from maml_rl.stored import has_results, read_summary
from maml_rl.task_sets import TaskSet, held_out, papers_own, validation
from maml_rl.train import MakeEngine, local, meta_train, resume
from maml_rl.trained import differing, experiment_of
from maml_rl.workplace import Workplace


@dataclass(frozen=True)
class Planned:
    """One training run of a benchmark."""

    method: Method
    experiment: Experiment[TaskFamily]
    path: Path

    @property
    def name(self) -> str:
        """The run in words."""
        return f"{self.method}, seed {self.experiment.seed}"


def plan(benchmark: Benchmark, base: Experiment[TaskFamily], out: Path) -> list[Planned]:
    """Return every training run, method by method.

    Raises:
        InputError: if a setting that follows from the benchmark is out of its range, or one that
            a method has of its own is unknown, of the wrong type or out of its range.
    """
    total = base.iterations if benchmark.iterations is None else benchmark.iterations
    if total < 1:
        raise InputError(f"iterations must be at least 1, got {total}")
    own = {method: with_own_settings(base, benchmark, method) for method in METHODS}
    pretrained, oracle = (
        replace(own[method], adaptation=replace(own[method].adaptation, inner_steps=0))
        for method in (PRETRAINED, ORACLE)
    )
    oracle = replace(oracle, policy=replace(oracle.policy, observe_task=True))
    # As many episodes as maml draws, so as many control steps.
    budget = total * episodes_drawn(own[MAML])
    variants: Mapping[Method, tuple[Experiment[TaskFamily], int]] = {
        MAML: (own[MAML], total),
        PRETRAINED: (pretrained, math.ceil(Fraction(budget, episodes_drawn(pretrained)))),
        ORACLE: (oracle, math.ceil(Fraction(budget, episodes_drawn(oracle)))),
        RANDOM: (own[RANDOM], 0),
    }
    planned = []
    for method in benchmark.methods:
        experiment, iterations = variants[method]
        for seed in benchmark.seeds:
            one = replace(experiment, seed=seed, iterations=iterations)
            planned.append(Planned(method, one, out / f"{method}-seed{seed}"))
    return planned


def episodes_drawn(experiment: Experiment[TaskFamily]) -> int:
    """Return how many episodes an iteration draws, of all tasks and batches."""
    sampling = experiment.sampling
    return (experiment.adaptation.inner_steps + 1) * sampling.tasks * sampling.episodes


def check_plan(
    planned: Sequence[Planned], given: Sequence[Path], *, settings_may_differ: bool = False
) -> dict[str, Subject]:
    """Return the policies of run folders to use as they are, by the planned run's name.

    Args:
        planned: every training run.
        given: run folders to use in place of training, besides those that are at their place.
        settings_may_differ: whether a folder given may have other settings than the planned run,
            or other iterations; its tasks must still be the benchmark's.

    Raises:
        InputError: if a folder given or at a planned place is another run's, or is not whole.
    """
    by_name = {one.name: one for one in planned}
    found: dict[str, Subject] = {}
    for subject in map(load_subject, given):
        path = subject.path
        who = f"{subject.method}, seed {subject.seed}"
        if who not in by_name:
            raise InputError(f"{path} is {who}, which this benchmark has not")
        if who in found:
            raise InputError(f"{found[who].path} and {path} are both {who}")
        check_given(by_name[who], subject, settings_may_differ)
        found[who] = subject
    for one in planned:
        if one.name in found:
            continue
        if (one.path / "config.yaml").is_file():
            check_same(one, one.path)
            try:
                iterations_done(one.path)
            except CheckpointError as error:
                hint = f"remove {one.path} to have it trained again"
                raise InputError(f"{error}; {hint}") from error
        else:
            RunFolder.check_free(one.path)
    return found


def check_reused(planned: Sequence[Planned], given: Mapping[str, Subject], out: Path) -> None:
    """Raise InputError where results are there of a run that was given, and now is to be trained.

    Args:
        planned: every training run.
        given: those that are given now.
        out: the benchmark's folder.
    """
    if not has_results(out):
        return
    reused = read_summary(out).reused
    for one in planned:
        if one.name in reused and one.name not in given and not one.path.exists():
            raise InputError(
                f"the results in {out} are of another run for {one.name}: {reused[one.name]}; give "
                "it again with --reuse, or choose another folder with --out DIR"
            )


def check_given(one: Planned, subject: Subject, settings_may_differ: bool) -> None:
    """Raise InputError where a run that is given cannot stand for the planned one."""
    path, wanted = subject.path, one.experiment
    if not wanted.family.comparable(subject.family):
        raise InputError(
            f"{path} is of {words_for(subject.family, wanted.family)}, and the benchmark of "
            f"{words_for(wanted.family, subject.family)}"
        )
    if settings_may_differ:
        return
    anyway = "--settings-may-differ takes it as it is"
    check_same(one, path, anyway)
    if subject.iterations != wanted.iterations:
        raise InputError(
            f"{path} has done {subject.iterations} iterations, and the benchmark wants "
            f"{wanted.iterations}; {anyway}"
        )


def check_same(
    one: Planned, path: Path, hint: str = "choose another folder with --out DIR"
) -> None:
    """Raise InputError, which ends in a hint, where a run was not trained as is planned."""
    there, ours = experiment_of(RunFolder.open(path)), one.experiment
    if there.family.name != ours.family.name:
        raise InputError(
            f"{path} is of {there.family.name}, and the benchmark of {ours.family.name}; {hint}"
        )
    if there.seed != ours.seed:
        raise InputError(f"{path} has seed {there.seed}, and {one.name} is to be there")
    if changed := differing(as_tree(there), as_tree(ours), NOT_OF_THE_RUN, most=5):
        raise InputError(
            f"{path} was trained with other settings than the benchmark's for {one.name}: "
            f"{changed}; {hint}"
        )
    if there.iterations > ours.iterations:
        raise InputError(
            f"{path} is to be trained for {there.iterations} iterations, and the benchmark wants "
            f"{ours.iterations}; {hint}"
        )
    if init := begun_from(path):
        raise InputError(
            f"{path} was begun with the parameters of {init}, so its budget is not the others'"
        )


NOT_OF_THE_RUN = re.compile(rf"iterations|{NOT_OF_THE_METHOD.pattern}")
"""Settings that a run may be reused with others of."""
NOT_OF_THE_TEST = re.compile(r"evaluation\.tasks|(?!evaluation\.).*")
"""Settings that say nothing of how a policy is tested, but for what tasks."""


def train_planned(one: Planned, watch: Watcher | None, engine: MakeEngine = local) -> None:
    """Train a planned run, or go on with it where it stopped; nothing where it is done.

    Args:
        one: the run.
        watch: is told of every iteration.
        engine: makes what iterations are done with.

    Raises:
        InputError: if its folder cannot be used.
        RunStopped: if the run ended early; what was done is kept.
    """
    wanted = one.experiment.iterations
    if not (one.path / "config.yaml").is_file():
        meta_train(one.experiment, out=one.path, watch=watch, engine=engine)
    elif iterations_done(one.path) < wanted:
        resume(one.path, iterations=wanted, watch=watch, engine=engine)


def train_side_by_side(planned: Sequence[Planned], place: Workplace, show: Show) -> None:
    """Train planned runs in threads, as many at once as the workplace has workers for.

    Where one fails the others end after their running iteration, and so on Ctrl-C or SIGTERM; all
    can be gone on with. The second Ctrl-C ends them at once.

    Args:
        planned: the runs.
        place: where.
        show: begins to show one, by its name.

    Raises:
        InputError: if a folder cannot be used.
        RunStopped: if a run ended early; what was done is kept.
    """
    at_once, left = place.at_once(len(planned)), len(planned)
    failures: list[tuple[Planned, BaseException]] = []
    lock = threading.Lock()

    def train(one: Planned) -> None:
        nonlocal left
        shown: Watcher | None = None

        def watch(row: Row, total: int) -> None:
            if shown is not None:
                shown(row, total)
            if requests.number or failures:
                raise RunStopped(f"stopped after {int(row['iteration']) + 1} of {total}", 3)

        try:
            if not requests.number and not failures:
                shown = show(one.name)
                train_planned(one, watch, place.engine)
        except BaseException as error:
            with lock:
                failures.append((one, error))
        finally:
            with lock:
                left -= 1
                place.to_come(min(at_once, left))

    place.to_come(at_once)
    with stop_requests() as requests, ThreadPoolExecutor(at_once, "maml-rl-run") as pool:
        # In a context like this one, where code of the user's may be allowed.
        running = [pool.submit(contextvars.copy_context().run, train, one) for one in planned]
        try:
            # For moments, so that signals are seen.
            while wait(running, timeout=1.0).not_done:
                pass
        except BaseException:
            place.drop()
            raise
        if requests.number:
            raise RunStopped("stopped after the running iterations", 128 + requests.number)
    for one, error in failures[:1]:
        if isinstance(error, RunStopped):
            raise RunStopped(f"{one.name}: {error}", error.exit_code) from error
        raise error


def progress(one: Planned) -> str:
    """Return in words where a planned run is and how far."""
    return f"{one.path}, {iterations_done(one.path)} of {one.experiment.iterations} iterations done"


def in_place_of(one: Planned, there: Subject) -> str:
    """Return in words what is taken in place of a planned run, and in what it differs from it."""
    wanted, found = as_tree(one.experiment), as_tree(there.trained.experiment)
    unlike = differing(wanted, found, NOT_OF_THE_RUN)
    tested = differing(found, wanted, NOT_OF_THE_TEST)
    words = f"{there.path}, {there.iterations} iterations, {there.env_steps:,} control steps in all"
    if there.iterations != one.experiment.iterations:
        words += f" ({one.experiment.iterations} iterations were planned)"
    if init := begun_from(there.path):
        words += f", begun with the parameters of {init}"
    words += f"; not as planned: {unlike}" if unlike else ""
    return words + (f"; in its own test and in this one: {tested}" if tested else "")


def iterations_done(path: Path) -> int:
    """Return how many iterations a run has done; 0 where there is none.

    Raises:
        CheckpointError: if no checkpoint of it is whole.
    """
    there = (path / "config.yaml").is_file()
    return RunFolder.open(path).load().state.iteration if there else 0


@dataclass(frozen=True)
class StepSizes:
    """The step sizes that a method is tested with."""

    own: float
    """The paper's, or alpha."""
    best: float
    """The best on validation tasks; `own` where nothing was tried, or nothing was better."""
    validation: Mapping[float, float]
    """Mean return on them after the last step, by step size; NaN where the test broke down."""

    @property
    def tried(self) -> list[float]:
        """Each once."""
        return list(dict.fromkeys((self.own, self.best)))


def choose_step_sizes(
    benchmark: Benchmark,
    subjects: Sequence[Subject],
    say: Callable[[str], None],
    tester: Tester = trials_here,
) -> dict[Method, StepSizes]:
    """Try candidates on validation tasks, and return each adapting method's step sizes.

    A method's runs are taken together, and the return after the last gradient step decides. Its
    own step size is tried too, and stays where nothing is better.

    Args:
        benchmark: with the candidates.
        subjects: the policies.
        say: is told what comes out.
        tester: does the tests.

    Raises:
        RunStopped: if memory does not suffice.
    """
    methods = dict.fromkeys(s.method for s in subjects)
    alphas = {m: common_alpha([s for s in subjects if s.method == m]) for m in methods}
    # Maml's, or where there is none that of a method without one of its own.
    plain = [alphas[m] for m in methods if not has_own_alpha(benchmark, m)]
    alpha = alphas.get(MAML, (plain or list(alphas.values()))[0])
    noisy = {s.method for s in subjects if s.trained.experiment.adaptation.times_variance}
    others = {m: alphas[m] for m in methods if m in noisy or has_own_alpha(benchmark, m)}
    own: Mapping[Method, float] = {
        MAML: alpha,
        PRETRAINED: benchmark.pretrained_step_size or others.get(PRETRAINED, alpha),
        RANDOM: benchmark.random_step_size or others.get(RANDOM, alpha),
    }
    tasks = validation(subjects[0].family, benchmark.validation_tasks)
    adapting = [method for method in benchmark.methods if method != ORACLE]
    runs = {method: [s for s in subjects if s.method == method] for method in adapting}
    tried = {
        method: list(dict.fromkeys((own[method], *benchmark.candidates)))
        for method in (adapting if benchmark.candidates else ())
    }
    trials = [
        Trial(run.trained, tasks, size)
        for method, sizes in tried.items()
        for size in sizes
        for run in runs[method]
    ]
    tested = iter(tester(trials))
    result: dict[Method, StepSizes] = {}
    for method in adapting:
        found = {}
        for size in tried.get(method, ()):
            found[size] = last_return([next(tested) for _ in runs[method]])
            say(f"{method}, step size {size:g}: {found[size]:.1f} on validation tasks")
        whole = {size: value for size, value in found.items() if not math.isnan(value)}
        best = max(whole, key=whole.__getitem__) if whole else own[method]
        result[method] = StepSizes(own[method], best, found)
        sizes = f"{own[method]:g} (its own)"
        sizes += f" and {best:g} (best on validation tasks)" if best != own[method] else ""
        say(f"{method} is tested with step size {sizes}")
    return result


ALPHA = tuple(
    f"adaptation.{name}"
    for name in ("step_size", "later_from", "later_step_sizes", "times_variance")
)
"""Settings that say what alpha is."""


def has_own_alpha(benchmark: Benchmark, method: Method) -> bool:
    """Whether `settings_of` says what alpha is in some iteration of a method."""
    return any(name in benchmark.settings_of.get(method, {}) for name in ALPHA)


def last_return(tests: Sequence[Evaluation | BrokenDown]) -> float:
    """Return the mean return of tests after the last gradient step, NaN if one broke down."""
    returns = [math.nan if isinstance(t, BrokenDown) else t.returns[-1].mean() for t in tests]
    return float(sum(returns) / len(returns))


def tasks_to_test(benchmark: Benchmark, base: Experiment[TaskFamily]) -> TaskSet:
    """Return the tasks that every method meets.

    Raises:
        FamilyError: if the paper has none for this family.
    """
    if benchmark.tasks == "paper":
        return papers_own(base.family)
    return held_out(base.family, base.evaluation.tasks)

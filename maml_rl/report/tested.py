"""The tests that a report is of: found in the folders it is made from, or made where they are not.

A run's own test lies in RUN/evaluation, a benchmark's in its folder, beside its runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maml_rl.assess import Subject, load_subject, load_subjects, outcomes_of, under_settings
from maml_rl.comparison import ORACLE, Comparison, Outcome
from maml_rl.errors import InputError, refusal
from maml_rl.results import write_own_test
from maml_rl.sampler import Count
from maml_rl.stored import RunTested, Summary, has_results, read_outcomes, read_summary
from maml_rl.task_sets import held_out
from maml_rl.versions import versions

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tested:
    """Policies with their tests."""

    subjects: list[Subject]
    outcomes: list[Outcome]
    compared: Comparison
    versions: list[Mapping[str, str]]
    """What the tests were made with."""
    folder: str = ""
    """Name of the folder that holds them all and their tests, "" where there is none."""
    benchmark: str = ""
    """Name of the benchmark that they are of, "" if of none."""
    notes: tuple[str, ...] = ()
    """What they must be read with."""


def gather(targets: Sequence[Path], checkpoint: str, say: Say) -> Tested:
    """Return the tests of runs or of a benchmark.

    Args:
        targets: run folders, or one benchmark's folder.
        checkpoint: which of each run.
        say: is told what takes time.

    Raises:
        InputError: for what is no run, or what cannot be compared.
        RunStopped: if a test breaks down or cannot be written.
    """
    benchmarks = [target for target in targets if is_benchmark(target)]
    if benchmarks and len(targets) > 1:
        raise refusal(
            f"{benchmarks[0]} is the folder of a benchmark, which has a page of its own; for one "
            "with other runs give its run folders"
        )
    if benchmarks:
        return benchmark_tested(benchmarks[0], checkpoint)
    for target in targets:
        check_run(target)
    subjects = load_subjects(targets, checkpoint)
    if len(subjects) == 1:
        return one_tested(subjects[0], checkpoint, say)
    return several_tested(subjects, say)


def is_benchmark(folder: Path) -> bool:
    """Whether a folder holds the results of several runs and is none itself."""
    return has_results(folder) and not is_run(folder) and not is_run(folder.absolute().parent)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()


def check_run(target: Path) -> None:
    """Raise InputError, with the folder that may have been meant, for what is no run folder."""
    if is_run(target):
        return
    above = target.absolute().parent
    if not target.exists():
        hint = "give a folder such as runs/quickstart-seed0; `maml-rl train` makes one"
        raise refusal(f"there is no {target}: {hint}")
    hint = (
        f"did you mean {target.parent}?"
        if is_run(above)
        else "a run's has config.yaml, a benchmark's evaluation.csv and summary.json"
    )
    raise refusal(f"{target} is neither the folder of a run nor of a benchmark: {hint}")


def one_tested(subject: Subject, checkpoint: str, say: Say) -> Tested:
    """Return a run's own test, made now if it has none of its checkpoint."""
    if (found := stored_test(subject)) is not None:
        outcomes, summary = found
        made_with = summary.versions
    elif checkpoint == "latest":
        say(f"{subject.path} has no test of its newest checkpoint and is tested now ...")
        outcomes, made_with = write_own_test(subject), versions()
    else:
        # RUN/evaluation is of the newest checkpoint.
        say(f"{subject.path} has no test of its checkpoint {checkpoint!r} and is tested now ...")
        outcomes, made_with = tested_now([subject]), versions()
    compared = Comparison.of(outcomes, subject.family)
    return Tested([subject], outcomes, compared, [made_with])


def several_tested(subjects: list[Subject], say: Say) -> Tested:
    """Return the tests of runs side by side: their own, if all met the same, or new ones."""
    found = [stored_test(subject) for subject in subjects]
    own = [test for test in found if test is not None and len(test[0]) == 1]
    tests = [outcomes[0] for outcomes, _ in own]
    if len(own) == len(subjects) and alike(tests):
        made_with = [summary.versions for _, summary in own]
        outcomes = [
            dataclasses.replace(test, variant=subject.variant)
            for test, subject in zip(tests, subjects, strict=True)
        ]
    else:
        say(
            "the runs have no tests on the same tasks by the same settings, and are tested now by "
            f"those of {subjects[0].path} ..."
        )
        outcomes, made_with = tested_now(subjects), [versions()]
    return Tested(subjects, outcomes, Comparison.of(outcomes, subjects[0].family), made_with)


def tested_now(subjects: Sequence[Subject]) -> list[Outcome]:
    """Test policies by the settings of the first, and write nothing."""
    settings = subjects[0].trained.experiment.evaluation
    tasks = held_out(subjects[0].family, settings.tasks)
    return outcomes_of(under_settings(subjects, settings), tasks, {})


def stored_test(subject: Subject) -> tuple[list[Outcome], Summary] | None:
    """Return the test in RUN/evaluation; None where there is none of the run's checkpoint.

    Raises:
        InputError: if its files are damaged.
    """
    folder = subject.path / "evaluation"
    if not has_results(folder):
        return None
    summary = read_summary(folder)
    if len(summary.runs) != 1 or not is_of(summary.runs[0], subject):
        return None
    return read_outcomes(folder, subject.family), summary


def is_of(tested: RunTested, subject: Subject) -> bool:
    """Whether a test was of this run's checkpoint."""
    then = (tested.method, tested.seed, tested.iterations, tested.env_steps)
    return then == (subject.method, subject.seed, subject.iterations, subject.env_steps)


def alike(tests: Sequence[Outcome]) -> bool:
    """Whether tests met the same tasks by as many episodes and steps; an oracle takes none."""
    first = tests[0]
    lengths = {len(test.evaluation.returns) for test in tests if test.method != ORACLE}
    return len(lengths) <= 1 and all(
        how(test) == how(first) and np.array_equal(test.evaluation.tasks, first.evaluation.tasks)
        for test in tests
    )


def how(test: Outcome) -> tuple[str, int, Count]:
    """Return which tasks a test was of, and by how much each."""
    return test.source, test.evaluation.episodes, test.evaluation.count


def benchmark_tested(folder: Path, checkpoint: str) -> Tested:
    """Return the tests that a benchmark's folder holds, with the runs that lie in it."""
    if checkpoint != "latest":
        raise InputError(
            "a benchmark is of its runs' newest checkpoints; for another give the run folders"
        )
    summary = read_summary(folder)
    subjects, notes = [], []
    for tested in summary.runs:
        path = folder / tested.run
        # A name alone: a summary from elsewhere must not lead out of its folder.
        if Path(tested.run).name != tested.run or not is_run(path):
            notes.append(f"The run {tested.run} does not lie in the folder, so its training is")
            notes[-1] += " not shown."
            continue
        subject = dataclasses.replace(load_subject(path), variant=tested.variant)
        subjects.append(subject)
        if not is_of(tested, subject):
            notes.append(
                f"The test is of {tested.run} after {tested.iterations} iterations; the run has "
                f"done {subject.iterations} by now."
            )
    if not subjects:
        raise refusal(
            f"{folder} holds results, and none of the runs that they are of "
            f"({', '.join(tested.run for tested in summary.runs)}); give the run folders"
        )
    family = subjects[0].family
    outcomes = read_outcomes(folder, family)
    return Tested(
        subjects,
        outcomes,
        Comparison.of(outcomes, family),
        [summary.versions],
        folder=folder.resolve().name,
        benchmark=summary.benchmark,
        notes=tuple(notes),
    )

"""What cannot fit is told before memory is taken, with what to lower."""

from __future__ import annotations

import pytest
import torch

from maml_rl import memory
from maml_rl.config import load_experiment, shipped_experiments
from maml_rl.errors import InputError
from maml_rl.memory import check_memory, is_out_of_memory
from maml_rl.trained import new_policy


@pytest.mark.parametrize("name", sorted(shipped_experiments()))
def test_every_experiment_fits_in_8_gb_and_so_does_40_x_20_x_200(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's scale fits in 2 GB by this estimate, which counts what must be there at least."""
    monkeypatch.setattr(memory, "physical_memory", lambda: 8 * 10**9)
    check_memory(load_experiment(name), "sampling", "evaluation")
    monkeypatch.setattr(memory, "physical_memory", lambda: 2 * 10**9)
    sizes = {"sampling__tasks": 40, "sampling__episodes": 20, "family__horizon": 200}
    paper = load_experiment(name, **sizes, policy__layers=[100, 100])
    check_memory(paper, "sampling", "evaluation")


def test_what_must_be_in_memory_at_once_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Navigation, 3 tasks x 4 episodes x 5 steps, one inner step, a policy 2-6-2.

    A step is 2 + 2 + 1 + 2 numbers of 4 bytes, a batch 60 steps, and there are 2 batches: 3360
    bytes. A policy is 18 + 14 + 2 numbers, and theta and 3 adapted ones are held: 544 bytes.
    """
    sizes: dict[str, object] = {"family__horizon": 5, "policy__layers": [6], "evaluation__tasks": 1}
    sizes |= {"sampling__tasks": 3, "sampling__episodes": 4, "evaluation__episodes": 1}
    experiment = load_experiment("navigation", **sizes)
    monkeypatch.setattr(memory, "physical_memory", lambda: 3360 + 544)
    check_memory(experiment, "sampling", "evaluation")
    monkeypatch.setattr(memory, "physical_memory", lambda: 3360 + 543)
    with pytest.raises(InputError, match="sampling: 3 tasks x 4 episodes x 5 steps take at least"):
        check_memory(experiment, "sampling")
    # A run of a larger machine can be tested here, and its policy held: 34 numbers.
    check_memory(experiment, "evaluation")
    monkeypatch.setattr(memory, "physical_memory", lambda: 4 * 34)
    new_policy(experiment)
    monkeypatch.setattr(memory, "physical_memory", lambda: 4 * 34 - 1)
    with pytest.raises(InputError, match=r"a policy of 34 parameters .* lower policy\.layers"):
        new_policy(experiment)


@pytest.mark.parametrize(
    ("sizes", "lower"),
    [
        ({"sampling__tasks": 10**5, "sampling__episodes": 10**5}, "lower sampling.tasks, "),
        ({"evaluation__tasks": 10**5, "evaluation__episodes": 10**5}, "lower evaluation.tasks, "),
        ({"policy__layers": [10**5] * 100}, "lower policy.layers or sampling.tasks"),
        (
            {"sampling__tasks": 10**5, "sampling__episodes": 10**5, "family__horizon": 1},
            "lower sampling.tasks_at_once, ",
        ),
    ],
)
def test_what_no_machine_holds_is_refused_before_memory_is_taken(
    sizes: dict[str, object], lower: str
) -> None:
    """Each number is in its range; the message names what to lower and the memory, GB."""
    absurd = load_experiment("ant_dir", **{"family__horizon": 1000, **sizes})
    with pytest.raises(InputError, match=rf"[0-9,]+\.[0-9] GB: {lower}"):
        check_memory(absurd, "sampling", "evaluation")


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
        "CUDA error: out of memory",
        "Failed to allocate 4294967296 bytes on device 'cuda:0'",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_memory_that_does_not_suffice_is_told_by_what_libraries_say(said: str) -> None:
    """torch on a CPU and a GPU, warp and cuBLAS raise errors of a general kind."""
    assert is_out_of_memory(RuntimeError(said))
    assert is_out_of_memory(torch.OutOfMemoryError("any"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))

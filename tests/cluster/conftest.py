"""Clusters on this machine's loopback, and tests that cannot hang."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Ray reads these when it is imported: small stores, no processes ahead of need.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES"] = str(80 * 2**20)
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  # its name

try:
    import ray
    from ray import cluster_utils
except ImportError:
    # The extra `cluster` is not installed.
    collect_ignore_glob = ["test_*.py"]

FILTERS = [
    # Ray's, of what its next version will do with GPUs that no worker asked for.
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:FutureWarning"),
    # Ray leaves its log files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # A busy machine takes its time to start a process.
    pytest.mark.filterwarnings("ignore:no worker is there"),
]

SECONDS = 150
"""After which a test has hung."""


@pytest.fixture(autouse=True)
def ends_in_time(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that hangs; where not even that is possible, end Python with its stacks."""

    def hung(number: int, frame: object) -> None:
        raise TimeoutError(f"{request.node.name} has not ended in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(SECONDS + 60, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def short_path() -> Iterator[None]:
    """Where Ray keeps its sockets, whose paths have to be short."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield
    shutil.rmtree(folder, ignore_errors=True)


def node(number: int, cores: int) -> dict[str, Any]:
    """What Ray is told of a node on the loopback, 127.0.0.`number`."""
    return {
        "node_ip_address": f"127.0.0.{number}",
        "num_cpus": cores,
        "object_store_memory": 80 * 2**20,
        "include_dashboard": False,
    }


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of one node with room for more workers than any test has."""
    there = cluster_utils.Cluster(initialize_head=True, head_node_args=node(2, 9))
    yield there.address
    there.shutdown()

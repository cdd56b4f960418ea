"""What a run is told of the Ray cluster that it may use; see `maml_rl/cluster.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from maml_rl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """A Ray cluster that shares the work: tasks of every iteration, tests, runs of a benchmark."""

    address: str = ""
    """`auto`: the Ray cluster that this machine belongs to; HOST:PORT: where the head of that
    cluster is, if there are several; `local:N`: N workers on this machine alone."""
    workers: int = 0
    """At most so many; 0 is as many as the cluster has cores for."""
    threads_per_worker: int = 1
    """Cores that a worker takes."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker takes; two workers with .5 share one."""
    patience: float = 300.0
    """Seconds to wait for a worker when there is none left, before the run ends."""
    hang: float = 120.0
    """Seconds after which a worker that does not answer is given up, or five times as long as the
    slowest took before; ten times so many for what none has done yet."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (
            ("workers", 0),
            ("threads_per_worker", 1),
            ("gpus_per_worker", 0),
            ("patience", 0),
            ("hang", 1),
        ):
            value = getattr(self, name)
            if not least <= value <= 100_000:
                raise InputError(f"cluster.{name} must be between {least} and 100000, got {value}")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise InputError(
                "cluster.gpus_per_worker must be a fraction or a whole number of GPUs, got "
                f"{self.gpus_per_worker:g}"
            )
        given = [
            f for f in fields(self) if f.name != "address" and getattr(self, f.name) != f.default
        ]
        if given and not self.address:
            raise InputError(f"cluster.{given[0].name} needs cluster.address")
        host, _, port = self.address.rpartition(":")
        if self.address not in ("", "auto") and not (host and port.isdecimal() and int(port)):
            raise InputError(
                f"cluster.address must be auto, HOST:PORT or local:N, got {self.address!r}"
            )

    @property
    def local_workers(self) -> int:
        """N of `local:N`, 0 for any other address."""
        host, _, count = self.address.rpartition(":")
        return int(count) if host == "local" else 0

    @property
    def most_workers(self) -> int:
        """Workers asked for, 0 for as many as there is room for."""
        return self.local_workers or self.workers

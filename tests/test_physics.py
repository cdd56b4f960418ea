"""A batch of worlds against one MjData a world and plain mj_step.

On CPU threads bit for bit; by mujoco_warp, in float32, within what rounding makes of four steps.
What a backend promises of its own numbers is bit for bit for both. mujoco_warp's worlds are on the
CPU, or where MAML_RL_WARP_DEVICE says.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
import torch

from envs.physics import CpuPhysics, Physics
from tests.on_host import DEVICE, live, numbered, physics_on_host

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

ASSETS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
BODIES = ("half_cheetah", "ant")
WORLDS, STEPS = 5, 4


@functools.cache
def load(body: str, *, sensors: bool) -> mujoco.MjModel:
    """Compile a body with its feet in reach of the floor, optionally with sensors of its torso."""
    text = (ASSETS / f"{body}.xml").read_text().replace('settotalmass="14"', "")
    spec = mujoco.MjSpec.from_string(text)
    if sensors:
        for name, kind in (
            ("velocity", mujoco.mjtSensor.mjSENS_SUBTREELINVEL),
            ("place", mujoco.mjtSensor.mjSENS_SUBTREECOM),
        ):
            spec.add_sensor(name=name, type=kind, objtype=mujoco.mjtObj.mjOBJ_BODY, objname="torso")
    return spec.compile()


class Plan(NamedTuple):
    """Where worlds start, what drives them, and which of them step when."""

    qpos: Floats  # (N, nq)
    qvel: Floats  # (N, nv)
    ctrl: Floats  # (T, N, nu)
    stepped: Mask  # (T, N)

    def rounded(self, number: npt.DTypeLike) -> Plan:
        """The plan in numbers that a backend can be given exactly."""
        qpos, qvel, ctrl = (part.astype(number).astype(np.float64) for part in self[:3])
        return Plan(qpos, qvel, ctrl, self.stepped)

    def without_pauses(self) -> Plan:
        """Every world's steps at once, and when it has had them, steps without control."""
        order = np.argsort(~self.stepped, axis=0, kind="stable")
        driven = np.where(self.stepped[:, :, None], self.ctrl, 0.0)
        ctrl = np.take_along_axis(driven, order[:, :, None], axis=0)
        return self._replace(ctrl=ctrl, stepped=np.ones_like(self.stepped))


def make_plan(model: mujoco.MjModel, *, masked: bool = False, seed: int = 3) -> Plan:
    """Draw a plan; the height of the root is such that contacts are there from the first step."""
    rng = np.random.default_rng(seed)
    qpos = model.qpos0 + rng.normal(0, 0.05, (WORLDS, model.nq))
    ant = model.nq == 15
    if ant:
        qpos += model.numeric("init_qpos").data - model.qpos0
    qpos[:, 2 if ant else 1] = rng.uniform(0.25, 0.35, WORLDS) - (0.0 if ant else 0.5)
    stepped = np.ones((STEPS, WORLDS), bool)
    if masked:
        stepped = rng.random((STEPS, WORLDS)) < 0.5
        stepped[0] = [False, True, True, False, True]
    return Plan(
        qpos,
        rng.normal(0, 0.5, (WORLDS, model.nv)),
        rng.uniform(-1, 1, (STEPS, WORLDS, model.nu)),
        stepped,
    )


class History(NamedTuple):
    """What happened: after the start and after every step, (T + 1, N, ...)."""

    qpos: Floats
    qvel: Floats
    sensors: Floats


def plain(model: mujoco.MjModel, plan: Plan, substeps: int) -> History:
    """One MjData a world and mj_step; sensors from mj_forward on a copy at the present state."""
    worlds = []
    touched = False
    for i in range(len(plan.qpos)):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = plan.qpos[i], plan.qvel[i]
        rows = []
        for t in range(STEPS + 1):
            if t > 0 and plan.stepped[t - 1, i]:
                data.ctrl[:] = plan.ctrl[t - 1, i]
                for _ in range(substeps):
                    mujoco.mj_step(model, data)
                touched |= data.ncon > 0
            present = copy.copy(data)
            mujoco.mj_forward(model, present)
            rows.append((data.qpos.copy(), data.qvel.copy(), present.sensordata.copy()))
        worlds.append(rows)
    assert touched, "without contact the solver and its warm start have nothing to do"
    fields = [np.array([[row[k] for row in rows] for rows in worlds]) for k in range(3)]
    return History(*(np.swapaxes(field, 0, 1) for field in fields))


def batched(physics: Physics, plan: Plan, substeps: int) -> History:
    """The same plan through a batch, closed loop; the idle worlds' controls are poison."""
    physics.set_state(torch.from_numpy(plan.qpos), torch.from_numpy(plan.qvel))
    fields: list[list[Floats]] = [[], [], []]
    for t in range(STEPS + 1):
        if t > 0:
            stepped = plan.stepped[t - 1]
            ctrl = torch.from_numpy(np.where(stepped[:, None], plan.ctrl[t - 1], 99.0))
            physics.step(ctrl, substeps, None if stepped.all() else torch.from_numpy(stepped))
            assert not physics.diverged.any()
        for field, values in zip(fields, present(physics), strict=True):
            field.append(values)
    return History(*(np.array(field) for field in fields))


def readings(physics: Physics) -> Floats:
    """Every sensor of the model by name, side by side, (N, nsensordata)."""
    names = [physics.model.sensor(i).name for i in range(physics.model.nsensor)]
    parts = [physics.sensor(name).double().numpy() for name in names]
    return np.concatenate([np.zeros((physics.count, 0)), *parts], axis=1)


def present(physics: Physics) -> History:
    """Copies of what a batch says now, (N, ...); float64 holds every float32."""
    qpos, qvel = (field.double().numpy().copy() for field in (physics.qpos, physics.qvel))
    return History(qpos, qvel, readings(physics))


def assert_same_bits(got: History, expected: History) -> None:
    for name, a, b in zip(History._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.int64), b.view(np.int64), err_msg=name)


class Widths(NamedTuple):
    """How far numbers may be from others: |a - b| <= width (1 + |b|)."""

    qpos: float
    qvel: float
    sensors: float


def assert_near(widths: Widths, got: History, expected: History) -> None:
    for name, width, a, b in zip(Widths._fields, widths, got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=width, atol=width, err_msg=name)


class Backend(NamedTuple):
    """A way to step worlds, and how near it comes to a plain loop."""

    make: Callable[[mujoco.MjModel, int], Physics]
    number: npt.DTypeLike
    """What it calculates in."""
    compare: Callable[[History, History], None]
    """Its history with that of the plain loop."""
    rounding: float
    """Of a reading that is 1."""
    device: str


def on_threads(model: mujoco.MjModel, count: int) -> Physics:
    return CpuPhysics(model, count, threads=2)


def by_warp(model: mujoco.MjModel, count: int) -> Physics:
    from envs.warp import WarpPhysics

    return physics_on_host(WarpPhysics(model, count, device=DEVICE))


CPU = Backend(on_threads, np.float64, assert_same_bits, 1e-12, "cpu")
NEAR = functools.partial(assert_near, Widths(1e-5, 1e-3, 1e-4))
WARP = Backend(by_warp, np.float32, NEAR, 1e-6, DEVICE)

both_backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(CPU, id="cpu"),
        pytest.param(
            WARP,
            id="warp",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    importlib.util.find_spec("mujoco_warp") is None, reason="needs mujoco-warp"
                ),
            ],
        ),
    ],
)


@pytest.mark.parametrize("substeps", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_every_bit_is_that_of_a_plain_loop(
    body: str, sensors: bool, threads: int, substeps: int
) -> None:
    """qpos, qvel and the sensors of the present state equal mj_step's, with RK4 and without.

    Half of the plans step some of the worlds: an idle world keeps every bit, and its next step
    is the one it would have taken.
    """
    model = load(body, sensors=sensors)
    physics = CpuPhysics(model, WORLDS, threads=threads)
    assert physics.threads == threads
    for masked in (False, True):
        plan = make_plan(model, masked=masked)
        assert_same_bits(batched(physics, plan, substeps), plain(model, plan, substeps))


@both_backends
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_an_idle_world_takes_the_step_that_it_would_have_taken(
    backend: Backend, body: str, sensors: bool
) -> None:
    """Bit for bit, pauses change nothing but when a world's steps are taken."""
    model = load(body, sensors=sensors)
    physics = backend.make(model, WORLDS)
    stepped = np.array(
        [[0, 1, 1, 0, 1], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=bool
    )
    plan = make_plan(model).rounded(backend.number)._replace(stepped=stepped)
    paused = batched(physics, plan, 2)
    backend.compare(paused, plain(model, plan, 2))
    times = [physics.data(world).time for world in range(WORLDS)]
    own = 2 * model.opt.timestep * stepped.sum(axis=0)
    assert times == pytest.approx(own.tolist(), rel=1e-6, abs=0)

    at_once = batched(physics, plan.without_pauses(), 2)
    taken = np.concatenate([np.zeros((1, WORLDS), int), stepped.cumsum(axis=0)])
    assert_same_bits(paused, History(*(field[taken, np.arange(WORLDS)] for field in at_once)))


@both_backends
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_a_masked_set_state_touches_its_worlds_alone(
    backend: Backend, body: str, sensors: bool
) -> None:
    """Worlds 1 and 3 get the state at hand; the others keep position, velocity and sensors.

    And the others' warm start: they go on as if nothing had happened.
    """
    model = load(body, sensors=sensors)
    physics = backend.make(model, WORLDS)
    plan = make_plan(model).rounded(backend.number)
    other = make_plan(model, seed=8).rounded(backend.number)
    ctrl = torch.from_numpy(plan.ctrl[0])
    batched(physics, plan, 1)
    physics.step(ctrl, 1)
    undisturbed = present(physics)

    before = batched(physics, plan, 1)
    where = torch.tensor([False, True, False, True, False])
    poison = torch.full((WORLDS, 1), 99.0, dtype=torch.float64)
    physics.set_state(
        torch.where(where[:, None], torch.from_numpy(other.qpos), poison),
        torch.where(where[:, None], torch.from_numpy(other.qvel), poison),
        where,
    )
    after = present(physics)
    idle, chosen = ~where.numpy(), where.numpy()
    for got, kept in zip(after, before, strict=True):
        np.testing.assert_array_equal(got[idle], kept[-1][idle])
    np.testing.assert_array_equal(after.qpos[chosen], other.qpos[chosen])
    np.testing.assert_array_equal(after.qvel[chosen], other.qvel[chosen])
    fresh = plain(model, other, 1)
    backend.compare(
        History(*(got[chosen] for got in after)), History(*(new[0][chosen] for new in fresh))
    )
    physics.step(ctrl, 1)
    for got, kept in zip(present(physics), undisturbed, strict=True):
        np.testing.assert_array_equal(got[idle], kept[idle])


@both_backends
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_set_state_forgets_what_happened_before(backend: Backend, body: str, sensors: bool) -> None:
    """The same state after different histories has the same future, bit for bit.

    MuJoCo starts its solver from the last acceleration: the plain loop first shows that keeping
    it would change bits.
    """
    model = load(body, sensors=sensors)
    plan = make_plan(model).rounded(backend.number)
    differs = False
    for i in range(WORLDS):
        clean, stale = mujoco.MjData(model), mujoco.MjData(model)
        for data, acceleration in ((clean, 0.0), (stale, 1.5)):
            data.qpos[:], data.qvel[:] = plan.qpos[i], plan.qvel[i]
            data.qacc_warmstart[:] = acceleration
            for _ in range(STEPS):
                mujoco.mj_step(model, data)
        differs |= bool((clean.qvel != stale.qvel).any())
    assert differs

    physics = backend.make(model, WORLDS)
    first = batched(physics, plan, 2)
    batched(physics, make_plan(model, masked=True, seed=8), 3)
    again = batched(physics, plan, 2)
    assert_same_bits(again, first)
    assert_same_bits(batched(backend.make(model, WORLDS), plan, 2), first)

    # The same through a mask, world by world.
    batched(physics, make_plan(model, seed=9), 1)
    for i in range(WORLDS):
        where = torch.arange(WORLDS) == i
        physics.set_state(torch.from_numpy(plan.qpos), torch.from_numpy(plan.qvel), where)
    physics.step(torch.from_numpy(plan.ctrl[0]), 2)
    np.testing.assert_array_equal(physics.qvel.double().numpy(), first.qvel[1])


class Trouble(NamedTuple):
    """A way to break world 1: an entry of its position, velocity or control."""

    field: str
    value: float


TROUBLES = (
    Trouble("qvel", 1e12),
    Trouble("qvel", float("nan")),
    Trouble("qpos", float("nan")),
    Trouble("ctrl", float("nan")),
)


@both_backends
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: f"{t.field}-{t.value}")
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_a_broken_world_is_flagged_and_harms_no_other(
    backend: Backend,
    body: str,
    sensors: bool,
    trouble: Trouble,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """World 1 breaks: flagged, each time anew; the other worlds' bits are those without it."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs.
    model = load(body, sensors=sensors)
    plan = make_plan(model).rounded(backend.number)
    physics = backend.make(model, WORLDS)
    expected = batched(physics, plan, 2)
    backend.compare(expected, plain(model, plan, 2))
    others = np.array([True, False, True, True, True])
    bad = {name: getattr(plan, name).copy() for name in ("qpos", "qvel", "ctrl")}
    if trouble.field == "ctrl":
        bad["ctrl"][:, 1, 0] = trouble.value
    else:
        bad[trouble.field][1, 2] = trouble.value
    flags = torch.tensor([False, True, False, False, False])

    for _ in range(3):
        # MuJoCo resets a broken world and its count of warnings, so the second time looks like
        # the first to whoever only compares counts.
        physics.set_state(torch.from_numpy(bad["qpos"]), torch.from_numpy(bad["qvel"]))
        assert not physics.diverged.any()
        physics.step(torch.from_numpy(bad["ctrl"][0]), 2)
        assert physics.diverged.tolist() == flags.tolist()
        handed_out = live(physics).diverged
        for got, wanted in zip(present(physics), expected, strict=True):
            np.testing.assert_array_equal(got[others], wanted[1][others])
        physics.step(torch.from_numpy(bad["ctrl"][1]), 2)
        # A broken state is gone after its step; a broken control breaks the next step as well.
        assert physics.diverged.tolist() == (flags & (trouble.field == "ctrl")).tolist()
        for got, wanted in zip(present(physics), expected, strict=True):
            np.testing.assert_array_equal(got[others], wanted[2][others])
        assert handed_out.tolist() == flags.tolist()


@both_backends
@pytest.mark.parametrize("body", BODIES)
def test_an_acceleration_out_of_bounds_breaks_a_world(
    backend: Backend, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A joint of world 1 turns at 1e8 rad/s, which is still a number; no number comes of it."""
    monkeypatch.chdir(tmp_path)
    model = load(body, sensors=False)
    physics = backend.make(model, 3)
    qvel = torch.zeros(3, model.nv, dtype=torch.float64)
    qvel[1, -1] = 1e8
    physics.set_state(torch.from_numpy(np.tile(model.qpos0, (3, 1))), qvel)
    for flags in ([False, True, False], [False, False, False]):
        physics.step(torch.zeros(3, model.nu), 1)
        assert physics.diverged.tolist() == flags
        assert physics.qvel.abs().max() < 99


@both_backends
@pytest.mark.parametrize("sensors", [False, True])
def test_divergence_is_kept_per_world(
    backend: Backend, sensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world that was not stepped has not diverged; set_state clears the flags of its worlds."""
    monkeypatch.chdir(tmp_path)
    model = load("half_cheetah", sensors=sensors)
    physics = backend.make(model, 3)
    qpos, qvel = torch.zeros(3, 9, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.float64)
    ctrl = torch.zeros(3, 6)
    qvel[0, 4] = qvel[1, 4] = 1e12
    physics.set_state(qpos, qvel)
    physics.step(ctrl, 1, torch.tensor([False, True, True]))
    assert physics.diverged.tolist() == [False, True, False]
    physics.step(ctrl, 1, torch.tensor([True, False, True]))
    assert physics.diverged.tolist() == [True, False, False]

    physics.set_state(qpos, qvel)
    physics.step(ctrl, 1)
    handed_out = live(physics).diverged
    assert handed_out.tolist() == [True, True, False]
    physics.set_state(qpos, torch.zeros_like(qvel), torch.tensor([True, False, False]))
    assert physics.diverged.tolist() == [False, True, False]
    assert handed_out.tolist() == [True, True, False], "a flag in a caller's hands changed"
    # A velocity written into the live view breaks the next step, also of a world broken before.
    for _ in range(2):
        live(physics).qvel[1, 4] = 1e12
        physics.step(ctrl, 1)
        assert physics.diverged.tolist() == [False, True, False]


@both_backends
def test_a_control_beyond_its_range_is_the_end_of_it(backend: Backend) -> None:
    """Infinite controls are 1 and -1 and break nothing down."""
    model = load("half_cheetah", sensors=False)
    physics = backend.make(model, 2)
    qpos, qvel = torch.zeros(2, 9, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.float64)
    physics.set_state(qpos, qvel)
    ctrl = torch.tensor([[1.0, -1.0, 0, 0, 0, 0]] * 2)
    ctrl[1, 0], ctrl[1, 1] = float("inf"), -float("inf")
    physics.step(ctrl, 1)
    assert not physics.diverged.any()
    assert physics.qvel[0].tolist() == physics.qvel[1].tolist()
    assert physics.qvel[0].abs().max() > 1


@pytest.mark.parametrize(("memory", "fits"), [(4000, False), (12000, False), (60000, True)])
def test_a_world_without_memory_is_flagged(
    memory: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World 1 has four contacts and too little memory for them; the others fall as ever.

    In MuJoCo 4.0 4,000 bytes is a warning, and 12,000 an error that leaves the state as it was.
    """
    monkeypatch.chdir(tmp_path)
    ball = '<body pos="{} 0 5"><freejoint/><geom size=".1"/></body>'
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><size memory="{memory}"/><worldbody><geom type="plane" size="9 9 .1"/>'
        + "".join(ball.format(i) for i in range(4))
        + "</worldbody></mujoco>"
    )
    physics = CpuPhysics(model, 3, threads=1)
    qpos = torch.from_numpy(np.tile(model.qpos0, (3, 1)))
    qpos[1, 2::7] = 0.05
    physics.set_state(qpos, torch.zeros(3, model.nv, dtype=torch.float64))
    physics.step(torch.zeros(3, 0), 1)
    assert physics.diverged.tolist() == [False, not fits, False]
    assert physics.qvel[::2, 2].tolist() == pytest.approx([-9.81 * 0.002] * 2, rel=1e-12)


@both_backends
def test_sensors_are_found_by_name(backend: Backend) -> None:
    """The cheetah's centre of mass, by hand: the masses' mean place at qpos0; and its drift."""
    model = load("half_cheetah", sensors=True)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    masses = [float(m) for m in model.body_mass[1:]]
    middle = [
        sum(m * float(x[a]) for m, x in zip(masses, data.xipos[1:], strict=True)) / sum(masses)
        for a in range(3)
    ]
    physics = backend.make(model, 2)
    qvel = torch.zeros(2, 9, dtype=torch.float64)
    qvel[1, 0], qvel[1, 1] = 2.5, -0.75  # The whole body slides: 2.5 m/s along x, -.75 along z.
    physics.set_state(torch.zeros(2, 9, dtype=torch.float64), qvel)
    for i in range(2):
        assert physics.sensor("place")[i].tolist() == pytest.approx(middle, abs=backend.rounding)
    assert physics.sensor("velocity")[0].tolist() == pytest.approx([0, 0, 0], abs=backend.rounding)
    drift = pytest.approx([2.5, 0, -0.75], abs=backend.rounding)
    assert physics.sensor("velocity")[1].tolist() == drift
    shapes = [tuple(physics.sensor(name).shape) for name in ("place", "velocity")]
    assert list(itertools.chain(*shapes)) == [2, 3, 2, 3]

    handed_out = live(physics).sensor("place")
    physics.set_state(torch.ones(2, 9, dtype=torch.float64), qvel)
    assert handed_out[0].tolist() == pytest.approx(middle, abs=backend.rounding), "no copy"


@both_backends
def test_one_world_can_be_looked_at(backend: Backend) -> None:
    """Its state as numbers, and as an MjData of its own with every derived field."""
    model = load("ant", sensors=True)
    plan = make_plan(model).rounded(backend.number)
    physics = backend.make(model, WORLDS)
    for _ in range(2):  # Time begins anew with a state.
        batched(physics, plan, 2)
    world = 3
    state, data = physics.state(world), physics.data(world)
    for name, field in (("qpos", physics.qpos), ("qvel", physics.qvel)):
        assert state[name].dtype == np.float64
        assert state[name].tolist() == getattr(data, name).tolist() == field[world].tolist()
    assert data.time == pytest.approx(STEPS * 2 * model.opt.timestep, rel=1e-6)
    assert data.ctrl.tolist() == plan.ctrl[-1, world].tolist()
    fresh = mujoco.MjData(model)
    fresh.qpos[:], fresh.qvel[:] = state["qpos"], state["qvel"]
    mujoco.mj_forward(model, fresh)
    for name in ("geom_xpos", "subtree_linvel", "sensordata"):
        got, wanted = (getattr(d, name).ravel().tolist() for d in (data, fresh))
        assert got == pytest.approx(wanted, abs=1e-12), name
    backend.compare(
        History(data.qpos, data.qvel, readings(physics)[world]),
        History(data.qpos, data.qvel, data.sensordata),
    )
    # Both are copies.
    data.qpos[:] = 99.0
    state["qvel"][:] = 99.0
    assert physics.qpos[world].max() < 9
    assert physics.qvel[world].max() < 99

    physics.set_state(physics.qpos.clone(), physics.qvel.clone(), torch.arange(WORLDS) == world)
    for i in range(WORLDS):
        controlled = physics.data(i).ctrl.tolist()
        assert controlled == ([0.0] * model.nu if i == world else plan.ctrl[-1, i].tolist())


@both_backends
def test_there_is_room_and_nothing_to_launch(backend: Backend) -> None:
    """On a CPU a body is its own graph; worlds and their tensors lie on the device asked for."""
    physics = live(backend.make(load("half_cheetah", sensors=True), 2))
    ctrl = torch.zeros(2, 6, device=physics.device)

    def body() -> None:
        physics.step(ctrl, 1)

    launch = physics.as_graph(body)
    assert (launch is body) == (physics.device.type == "cpu")
    launch()
    assert physics.trouble() == ""
    assert physics.device == numbered(backend.device)
    fields = (physics.qpos, physics.qvel, physics.sensor("place"))
    assert {field.dtype for field in fields} == {torch.from_numpy(np.ones(1, backend.number)).dtype}
    assert {field.device for field in fields} == {physics.device}


@both_backends
def test_there_is_at_least_one_world(backend: Backend) -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        backend.make(load("half_cheetah", sensors=False), 0)

"""A batch of worlds, bit for bit against one MjData a world and plain mj_step."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
import pytest
import torch

from envs.physics import CpuPhysics

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


def batched(physics: CpuPhysics, plan: Plan, substeps: int) -> History:
    """The same plan through CpuPhysics, closed loop; the idle worlds' controls are poison."""
    physics.set_state(torch.from_numpy(plan.qpos), torch.from_numpy(plan.qvel))
    fields: list[list[Floats]] = [[], [], []]
    for t in range(STEPS + 1):
        if t > 0:
            stepped = plan.stepped[t - 1]
            ctrl = torch.from_numpy(np.where(stepped[:, None], plan.ctrl[t - 1], 99.0))
            physics.step(ctrl, substeps, None if stepped.all() else torch.from_numpy(stepped))
            assert not physics.diverged.any()
        fields[0].append(physics.qpos.numpy().copy())
        fields[1].append(physics.qvel.numpy().copy())
        fields[2].append(readings(physics))
    return History(*(np.array(field) for field in fields))


def readings(physics: CpuPhysics) -> Floats:
    """Every sensor of the model by name, side by side, (N, nsensordata)."""
    names = [physics.model.sensor(i).name for i in range(physics.model.nsensor)]
    parts = [physics.sensor(name).numpy() for name in names]
    return np.concatenate([np.zeros((physics.count, 0)), *parts], axis=1)


def assert_same_bits(got: History, expected: History) -> None:
    for name, a, b in zip(History._fields, got, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.int64), b.view(np.int64), err_msg=name)


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


@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_a_masked_set_state_touches_its_worlds_alone(body: str, sensors: bool) -> None:
    """Worlds 1 and 3 get the state at hand; the others keep position, velocity and sensors."""
    model = load(body, sensors=sensors)
    physics = CpuPhysics(model, WORLDS, threads=2)
    plan, other = make_plan(model), make_plan(model, seed=8)
    before = batched(physics, plan, 1)
    where = torch.tensor([False, True, False, True, False])
    poison = torch.full((WORLDS, 1), 99.0, dtype=torch.float64)
    physics.set_state(
        torch.where(where[:, None], torch.from_numpy(other.qpos), poison),
        torch.where(where[:, None], torch.from_numpy(other.qvel), poison),
        where,
    )
    fresh = plain(model, other, 1)
    for got, kept, new in zip(
        (physics.qpos.numpy(), physics.qvel.numpy(), readings(physics)), before, fresh, strict=True
    ):
        expected = np.where(where[:, None].numpy(), new[0], kept[-1])
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_set_state_forgets_what_happened_before(body: str, sensors: bool) -> None:
    """The same state after different histories has the same future, bit for bit.

    MuJoCo starts its solver from the last acceleration: the plain loop first shows that keeping
    it would change bits.
    """
    model = load(body, sensors=sensors)
    plan = make_plan(model)
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

    physics = CpuPhysics(model, WORLDS, threads=1)
    first = batched(physics, plan, 2)
    batched(physics, make_plan(model, masked=True, seed=8), 3)
    again = batched(physics, plan, 2)
    assert_same_bits(again, first)

    # The same through a mask, world by world.
    batched(physics, make_plan(model, seed=9), 1)
    for i in range(WORLDS):
        where = torch.arange(WORLDS) == i
        physics.set_state(torch.from_numpy(plan.qpos), torch.from_numpy(plan.qvel), where)
    physics.step(torch.from_numpy(plan.ctrl[0]), 2)
    np.testing.assert_array_equal(physics.qvel.numpy(), first.qvel[1])


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


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: f"{t.field}-{t.value}")
@pytest.mark.parametrize("sensors", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_a_broken_world_is_flagged_and_harms_no_other(
    body: str, sensors: bool, trouble: Trouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """World 1 breaks: flagged, each time anew; the other worlds' bits are those without it."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log where it runs.
    model = load(body, sensors=sensors)
    plan = make_plan(model)
    expected = plain(model, plan, 2)
    others = np.array([True, False, True, True, True])
    bad = {name: getattr(plan, name).copy() for name in ("qpos", "qvel", "ctrl")}
    if trouble.field == "ctrl":
        bad["ctrl"][:, 1, 0] = trouble.value
    else:
        bad[trouble.field][1, 2] = trouble.value
    flags = torch.tensor([False, True, False, False, False])

    physics = CpuPhysics(model, WORLDS, threads=2)
    for _ in range(3):
        # MuJoCo resets a broken world and its count of warnings, so the second time looks like
        # the first to whoever only compares counts.
        physics.set_state(torch.from_numpy(bad["qpos"]), torch.from_numpy(bad["qvel"]))
        assert not physics.diverged.any()
        physics.step(torch.from_numpy(bad["ctrl"][0]), 2)
        assert physics.diverged.tolist() == flags.tolist()
        handed_out = physics.diverged
        for name, got in (
            ("qpos", physics.qpos.numpy()),
            ("qvel", physics.qvel.numpy()),
            ("sensors", readings(physics)),
        ):
            np.testing.assert_array_equal(got[others], getattr(expected, name)[1][others])
        physics.step(torch.from_numpy(bad["ctrl"][1]), 2)
        # A broken state is gone after its step; a broken control breaks the next step as well.
        assert physics.diverged.tolist() == (flags & (trouble.field == "ctrl")).tolist()
        np.testing.assert_array_equal(physics.qpos.numpy()[others], expected.qpos[2][others])
        assert handed_out.tolist() == flags.tolist()


@pytest.mark.parametrize("sensors", [False, True])
def test_divergence_is_kept_per_world(
    sensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A world that was not stepped has not diverged; set_state clears the flags of its worlds."""
    monkeypatch.chdir(tmp_path)
    model = load("half_cheetah", sensors=sensors)
    physics = CpuPhysics(model, 3, threads=1)
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
    handed_out = physics.diverged
    assert handed_out.tolist() == [True, True, False]
    physics.set_state(qpos, torch.zeros_like(qvel), torch.tensor([True, False, False]))
    assert physics.diverged.tolist() == [False, True, False]
    assert handed_out.tolist() == [True, True, False], "a flag in a caller's hands changed"
    # A velocity written into the live view breaks the next step, also of a world broken before.
    for _ in range(2):
        physics.qvel[1, 4] = 1e12
        physics.step(ctrl, 1)
        assert physics.diverged.tolist() == [False, True, False]


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


def test_sensors_are_found_by_name() -> None:
    """The cheetah's centre of mass, by hand: the masses' mean place at qpos0; and its drift."""
    model = load("half_cheetah", sensors=True)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    masses = [float(m) for m in model.body_mass[1:]]
    middle = [
        sum(m * float(x[a]) for m, x in zip(masses, data.xipos[1:], strict=True)) / sum(masses)
        for a in range(3)
    ]
    physics = CpuPhysics(model, 2, threads=1)
    qvel = torch.zeros(2, 9, dtype=torch.float64)
    qvel[1, 0], qvel[1, 1] = 2.5, -0.75  # The whole body slides: 2.5 m/s along x, -.75 along z.
    physics.set_state(torch.zeros(2, 9, dtype=torch.float64), qvel)
    for i in range(2):
        assert physics.sensor("place")[i].tolist() == pytest.approx(middle, abs=1e-12)
    assert physics.sensor("velocity")[0].tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert physics.sensor("velocity")[1].tolist() == pytest.approx([2.5, 0, -0.75], abs=1e-12)
    shapes = [tuple(physics.sensor(name).shape) for name in ("place", "velocity")]
    assert list(itertools.chain(*shapes)) == [2, 3, 2, 3]


def test_there_is_at_least_one_world() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        CpuPhysics(load("half_cheetah", sensors=False), 0)

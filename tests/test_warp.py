"""Physics by mujoco_warp: next to MuJoCo's, its room, and what it does about trouble.

What it shares with physics on CPU threads is in `test_physics.py`, for both. Worlds are on the
CPU, or where MAML_RL_WARP_DEVICE says.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, NamedTuple

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

import envs
from envs.ant import AntDir
from envs.family import Draws, FamilyError, TaskFamily, Transition, WarpSettings, decided
from envs.locomotion import LocomotionFamily
from envs.navigation import Navigation2D
from envs.physics import CpuPhysics, Physics
from tests.on_host import DEVICE, home, numbered, physics_on_host, worlds_on_host
from tests.test_gymnasium_family import pendulum

# Importing warp alone takes seconds.
pytestmark = pytest.mark.slow

needs_warp = pytest.mark.skipif(
    importlib.util.find_spec("mujoco_warp") is None, reason="needs mujoco-warp"
)
"""For what only reads envs/warp.py; what runs its kernels, which may have to be compiled, is
`slow` as well."""


def by_warp(model: mujoco.MjModel, count: int, settings: WarpSettings | None = None) -> Physics:
    from envs.warp import WarpPhysics

    return physics_on_host(WarpPhysics(model, count, device=DEVICE, settings=settings))


def model_of(family: LocomotionFamily) -> mujoco.MjModel:
    return family.build_model(family.sensors)


NAMES = ("half_cheetah_vel", "ant_dir")


def body(name: str, protocol: str = "paper") -> LocomotionFamily:
    family = envs.make(name, protocol=protocol)
    assert isinstance(family, LocomotionFamily)
    return family


# One step.


class Moment(NamedTuple):
    """States on the way of 64 random bodies, and what is done to them next."""

    qpos: Tensor
    """(N, nq) float32."""
    qvel: Tensor
    ctrl: Tensor
    """(N, nu)."""


N, MOMENTS, STRIDE = 64, 10, 10


@functools.cache
def moments(name: str, protocol: str) -> list[Moment]:
    """Every tenth control step of bodies that CPU threads simulate under random actions."""
    family = body(name, protocol)
    model = model_of(family)
    rng = np.random.default_rng(5)
    physics = CpuPhysics(model, N, threads=1)
    starts = torch.from_numpy(np.stack([family.draw_start(rng) for _ in range(N)]))
    nq = model.nq
    start = torch.from_numpy(family.start_positions(model))
    physics.set_state(start + starts[:, :nq], starts[:, nq:])
    found = []
    for step in range(MOMENTS * STRIDE):
        ctrl = torch.from_numpy(rng.uniform(-1, 1, (N, model.nu)).astype(np.float32))
        if step % STRIDE == STRIDE - 1:
            found.append(Moment(physics.qpos.float(), physics.qvel.float(), ctrl))
        physics.step(ctrl, family.frame_skip or 1)
    return found


class Widths(NamedTuple):
    """How far one step may lead from MuJoCo's: |a - b| <= width (1 + |b|), in SI units."""

    qpos: float
    qvel: float
    sensors: float


@needs_warp
@pytest.mark.parametrize(
    ("name", "protocol", "substeps", "widths"),
    [
        # As measured, at most: 1.2e-6, 6.7e-5, 8.6e-6.
        ("half_cheetah_vel", "paper", 1, Widths(1e-5, 5e-4, 5e-5)),
        # 2.1e-6, 1.5e-4.
        ("half_cheetah_vel", "gymnasium", 1, Widths(1e-5, 5e-4, 0.0)),
        # 3.1e-5, 2.3e-3, and 99 of 100 within a twentieth of that.
        ("half_cheetah_vel", "gymnasium", 5, Widths(2e-4, 1e-2, 0.0)),
        # 1.6e-7, 3.7e-6, 1.2e-6.
        ("ant_dir", "paper", 1, Widths(1e-6, 2e-5, 1e-5)),
        # 6.9e-8, 2.4e-6.
        ("ant_dir", "gymnasium", 1, Widths(1e-6, 2e-5, 0.0)),
        # 1.5e-7, 1.5e-5.
        ("ant_dir", "gymnasium", 5, Widths(2e-6, 1e-4, 0.0)),
    ],
)
def test_a_step_leads_where_that_of_mujoco_does(
    name: str, protocol: str, substeps: int, widths: Widths
) -> None:
    """From 640 states of bodies that move, a third or more of them in contact.

    Contacts not turned along the ant's capsules lead .4 rad/s apart, half the time step 1 rad/s,
    sensors of the step before 1 m.
    """
    family = body(name, protocol)
    model = model_of(family)
    plain, warp = CpuPhysics(model, N, threads=1), by_warp(model, N)
    touching = 0
    for qpos, qvel, ctrl in moments(name, protocol):
        for physics in (plain, warp):
            physics.set_state(qpos, qvel)
        touching += sum(plain.data(i).ncon > 0 for i in range(N))
        for physics in (plain, warp):
            physics.step(ctrl, substeps)
            assert not physics.diverged.any()
        assert warp.trouble() == ""
        torch.testing.assert_close(
            warp.qpos.double(), plain.qpos, rtol=widths.qpos, atol=widths.qpos
        )
        torch.testing.assert_close(
            warp.qvel.double(), plain.qvel, rtol=widths.qvel, atol=widths.qvel
        )
        for sensor in family.sensors:
            torch.testing.assert_close(
                warp.sensor(sensor).double(),
                plain.sensor(sensor),
                rtol=widths.sensors,
                atol=widths.sensors,
            )
    assert touching > MOMENTS * N * 0.3


# Episodes.


class Outcomes(NamedTuple):
    """What became of W episodes, each (W,)."""

    returns: Tensor
    heights: Tensor
    """Of the torso at the last live step, m."""
    steps: Tensor
    """Live ones."""


class Policy(NamedTuple):
    """Linear feedback and noise, the same for whoever simulates."""

    gain: Tensor
    """(O, A)."""
    noise: Tensor
    """(T, W, A)."""


def outcomes(
    observations: Tensor, step: Callable[[Tensor], Transition], policy: Policy, height: int
) -> Outcomes:
    """Follow episodes from their first observations; `height` is the entry that is the torso's."""
    alive = torch.ones(len(observations), dtype=torch.bool)
    returns, steps = torch.zeros(2, len(observations), dtype=torch.float64)
    heights = observations[:, height].double()
    for noise in policy.noise:
        after = step(torch.tanh(observations @ policy.gain) + 0.5 * noise)
        assert not (alive & after.diverged).any()
        observations = after.observations
        returns += torch.where(alive, after.rewards.double(), 0.0)
        heights = torch.where(alive, observations[:, height].double(), heights)
        steps += alive
        alive = alive & ~after.terminated
    return Outcomes(returns, heights, steps)


@needs_warp
@pytest.mark.parametrize(
    ("name", "protocol", "steps", "height", "apart"),
    [
        # Half of the episodes' returns are nearer than "apart"; measured: 9e-4, 2e-2, 2e-5.
        ("half_cheetah_dir", "paper", 60, 0, 0.01),
        ("half_cheetah_dir", "gymnasium", 25, 0, 0.2),
        ("ant_dir", "paper", 50, 2, 1e-3),
    ],
)
def test_episodes_are_alike(
    name: str, protocol: str, steps: int, height: int, apart: float
) -> None:
    """256 episodes of a random policy from the same starts: returns, heights and lengths.

    Means differ by less than three standard errors of the difference, and half of the episodes are
    the same but for rounding, which chaos makes much of in the rest.
    """
    worlds = 256
    family = envs.make(name, protocol=protocol)
    rng = np.random.default_rng(0)
    starts = np.stack([family.draw_start(rng) for _ in range(worlds)]).astype(np.float32)
    tasks = torch.from_numpy(family.sample_tasks(worlds, rng))
    sizes = len(family.observation_columns), len(family.action_columns)
    policy = Policy(
        gain=torch.from_numpy(0.3 * rng.standard_normal(sizes)).float(),
        noise=torch.from_numpy(rng.standard_normal((steps, worlds, sizes[1]))).float(),
    )
    with family.make_worlds(worlds, threads=1) as plain:
        first = plain.reset(tasks, starts.astype(np.float64))
        expected = outcomes(first, plain.step, policy, height)
    made = family.make_device_worlds(worlds, device=DEVICE, settings=WarpSettings())
    warp = worlds_on_host(made)
    first = warp.reset(tasks, torch.from_numpy(starts))
    got = outcomes(first, warp.step, policy, height)
    assert warp.trouble() == ""

    fallen = float((expected.steps < steps).double().mean())
    assert (fallen > 0.3) == (name == "ant_dir")
    assert float((got.returns - expected.returns).abs().median()) < apart
    for field, a, b in zip(Outcomes._fields, got, expected, strict=True):
        difference = a - b
        error = float(difference.std()) / worlds**0.5
        assert abs(float(difference.mean())) <= 3 * error, field


# Room.


def beyond_all(model: mujoco.MjModel) -> mujoco.MjData:
    """The body under the floor with every joint beyond its range, constraints made."""
    data = mujoco.MjData(model)
    for joint in range(model.njnt):
        if model.jnt_limited[joint]:
            data.qpos[model.jnt_qposadr[joint]] = model.jnt_range[joint, 1] + 0.1
    data.qpos[2 if model.jnt_type[0] == mujoco.mjtJoint.mjJNT_FREE else 1] = -3.0
    mujoco.mj_forward(model, data)
    return data


@needs_warp
@pytest.mark.parametrize(
    ("name", "contacts", "rows"),
    [
        # 8 capsules with 2 contacts each, 4 rows a contact, 6 joints.
        ("half_cheetah_vel", 16, 16 * 4 + 6),
        # A ball and 12 capsules; 8 joints.
        ("ant_dir", 25, 25 * 4 + 8),
    ],
)
def test_a_body_has_room_for_its_worst_pose_and_none_to_spare(
    name: str, contacts: int, rows: int
) -> None:
    from envs.warp import room

    model = model_of(body(name))
    worst = beyond_all(model)
    assert room(model) == WarpSettings(nconmax=contacts, njmax=rows)
    assert (worst.ncon, worst.nefc) == (contacts, rows)
    rng = np.random.default_rng(1)
    for _ in range(200):
        data = mujoco.MjData(model)
        data.qpos[:] = model.qpos0 + rng.normal(0, 2, model.nq)
        mujoco.mj_forward(model, data)
        assert data.ncon <= contacts
        assert data.nefc <= rows

    qpos = torch.from_numpy(np.array(worst.qpos)).unsqueeze(0)
    qvel, ctrl = torch.zeros(1, model.nv), torch.zeros(1, model.nu)
    for settings, complaint in (
        (WarpSettings(), ""),
        (WarpSettings(njmax=rows, nconmax=contacts), ""),
        (WarpSettings(njmax=rows - 1), f"warp.njmax (now {rows - 1})"),
        (WarpSettings(nconmax=contacts - 1), f"warp.nconmax (now {contacts - 1})"),
    ):
        physics = by_warp(model, 1, settings)
        physics.set_state(qpos, qvel)
        physics.step(ctrl, 1)
        assert physics.diverged.tolist() == [bool(complaint)]
        assert physics.trouble().partition("raise ")[2] == complaint


def ball(attributes: str = "", joint: str = '<freejoint name="{}"/>', name: str = "one") -> str:
    """A body with one sphere of radius 1 at the origin."""
    geom = f'<geom name="{name}" size="1" {attributes}/>'
    return f'<body name="{name}">{joint.format(name)}{geom}</body>'


def world(*bodies: str) -> str:
    return f"<worldbody>{''.join(bodies)}</worldbody>"


def two(attributes: str = "", more: str = "") -> str:
    """Two free balls in one place, and what else there is."""
    return world(ball(attributes), ball(attributes, name="other")) + more


def nested(outer: str, inner: str) -> str:
    """A ball in a ball's body, each with its joint or none."""
    child = ball(joint=inner, name="other")
    return world(ball(joint=outer).replace("</body>", child + "</body>"))


def shapes(first: str, second: str) -> str:
    """Two geoms of free bodies, or of the world if it is a plane or a height field."""
    bodies = (
        f"<geom {geom}/>"
        if 'type="plane"' in geom or 'type="hfield"' in geom
        else f"<body><freejoint/><geom {geom}/></body>"
        for geom in (first, second)
    )
    return world(*bodies)


FIXED = '<geom size="1"/>'
HINGE = '<joint name="{}"/>'
BARE = 'contype="0" conaffinity="0"'
FLAT = '<option cone="elliptic"/>'
UNFILTERED = '<option><flag filterparent="disable"/></option>'
STIFF = '<joint name="{}" frictionloss="1"/>'
BENT = '<joint name="{}" frictionloss="1" ref="60" range="-10 10"/>'
"""Angles in degrees; its reference is its pose, far beyond its range."""
STRING = '<tendon><fixed name="string" {}><joint joint="one" coef="1"/></fixed></tendon>'


class Small(NamedTuple):
    """A model, and how many contacts and constraint rows MuJoCo finds in its first pose."""

    mjcf: str
    contacts: int
    rows: int


SMALL: Mapping[str, Small] = {
    "two spheres": Small(two(), 1, 4),
    "without friction": Small(two('condim="1"'), 1, 1),
    "torsion": Small(two('condim="4"'), 1, 6),
    "rolling": Small(two('condim="6"'), 1, 10),
    "the larger condim": Small(world(ball('condim="1"'), ball('condim="4"', name="other")), 1, 6),
    "elliptic": Small(FLAT + two(), 1, 3),
    "elliptic without friction": Small(FLAT + two('condim="1"'), 1, 1),
    "elliptic rolling": Small(FLAT + two('condim="6"'), 1, 6),
    "excluded": Small(two(more='<contact><exclude body1="other" body2="one"/></contact>'), 0, 0),
    "a named pair": Small(
        two(BARE, '<contact><pair geom1="other" geom2="one" condim="1"/></contact>'), 1, 1
    ),
    "a named pair that rolls": Small(
        two(BARE, '<contact><pair geom1="one" geom2="other" condim="6"/></contact>'), 1, 10
    ),
    "a named pair that would collide anyway": Small(
        two(more='<contact><pair geom1="other" geom2="one" condim="1"/></contact>'), 1, 1
    ),
    "named and excluded": Small(
        two(
            more='<contact><pair geom1="other" geom2="one"/>'
            '<exclude body1="one" body2="other"/></contact>'
        ),
        1,
        4,
    ),
    "no affinity": Small(two('conaffinity="0"'), 0, 0),
    "affinity of one": Small(
        world(ball('conaffinity="0"'), ball('contype="0"', name="other")), 1, 4
    ),
    "affinity of the other": Small(
        world(ball('contype="0"'), ball('conaffinity="0"', name="other")), 1, 4
    ),
    "other bits": Small(two('contype="2" conaffinity="1"'), 0, 0),
    "parent and child": Small(nested('<freejoint name="{}"/>', HINGE), 0, 0),
    "parent and child, unfiltered": Small(
        UNFILTERED + nested('<freejoint name="{}"/>', HINGE), 1, 4
    ),
    "welded to its parent": Small(UNFILTERED + nested(HINGE, ""), 0, 0),
    "a static parent": Small(nested("", HINGE), 1, 4),
    "the world as parent": Small(world(FIXED, ball(joint=HINGE)), 1, 4),
    "both static": Small(world(FIXED, ball(joint="")), 0, 0),
    "moved by hand": Small(world(FIXED, f'<body mocap="true">{FIXED}</body>'), 0, 0),
    "connect": Small(
        two(BARE, '<equality><connect body1="one" body2="other" anchor="0 0 0"/></equality>'), 0, 3
    ),
    "weld": Small(two(BARE, '<equality><weld body1="one" body2="other"/></equality>'), 0, 6),
    "coupled joints": Small(
        world(ball(BARE, HINGE), ball(BARE, STIFF, "other"))
        + '<equality><joint joint1="one" joint2="other"/></equality>',
        0,
        2,
    ),
    "friction of a joint": Small(world(ball(BARE, '<joint type="ball" frictionloss="1"/>')), 0, 3),
    "limited": Small(world(ball(BARE, BENT)), 0, 2),
    "a limited tendon": Small(world(ball(BARE, STIFF)) + STRING.format('range="1 2"'), 0, 2),
    "friction of a tendon": Small(
        world(ball(BARE, STIFF)) + STRING.format('frictionloss="1"'), 0, 2
    ),
    "boxes": Small(
        shapes('type="box" size="1 1 1"', 'type="box" size="1 1 1" pos="0 0 1.9" euler="0 0 45"'),
        8,
        32,
    ),
    "a box on a plane": Small(
        shapes('type="plane" size="9 9 1"', 'type="box" size="1 1 1" pos="0 0 .9"'), 4, 16
    ),
    "a capsule on a plane": Small(
        shapes(
            'type="plane" size="9 9 1"', 'type="capsule" size=".5 1" pos="0 0 .4" euler="0 90 0"'
        ),
        2,
        8,
    ),
}


@needs_warp
@pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)
def test_room_is_what_mujoco_needs(small: Small) -> None:
    from envs.warp import room

    model = mujoco.MjModel.from_xml_string(f"<mujoco>{small.mjcf}</mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    assert (data.ncon, data.nefc) == (small.contacts, small.rows)
    # No array is empty.
    assert room(model) == WarpSettings(nconmax=max(1, data.ncon), njmax=max(1, data.nefc))


def random_tree(rng: np.random.Generator) -> mujoco.MjModel:
    """Bodies on bodies, some of them welded or moved by hand; all spheres in one place."""
    spec = mujoco.MjSpec()
    if rng.random() < 0.3:
        spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_FILTERPARENT)
    bodies, geoms = [spec.worldbody], list[mujoco.MjsGeom]()
    for index in range(int(rng.integers(3, 8))):
        parent = bodies[int(rng.integers(len(bodies)))]
        body = parent.add_body(name=f"body {index}")
        if parent is spec.worldbody and rng.random() < 0.2:
            body.mocap = True
        elif rng.random() < 0.6:
            body.add_joint(type=mujoco.mjtJoint.mjJNT_HINGE)
        bodies.append(body)
    for body in bodies:
        for _ in range(int(rng.integers(1, 3))):
            geom = body.add_geom(name=f"geom {len(geoms)}", size=[1, 0, 0], mass=1)
            geom.contype, geom.conaffinity = rng.integers(0, 4, 2)
            geom.condim = rng.choice([1, 3, 4, 6])
            geoms.append(geom)
    for one, other in {tuple(rng.choice(len(bodies), 2, replace=False)) for _ in range(2)}:
        if one < other:
            spec.add_exclude(bodyname1=bodies[one].name, bodyname2=bodies[other].name)
    for one, other in {tuple(rng.choice(len(geoms), 2, replace=False)) for _ in range(2)}:
        if one < other:
            names = {"geomname1": geoms[other].name, "geomname2": geoms[one].name}
            spec.add_pair(**names, condim=int(rng.choice([1, 3, 4, 6])))
    return spec.compile()


@needs_warp
def test_the_pairs_that_may_collide_are_those_that_do() -> None:
    """In 200 random trees with all geoms in one place."""
    from envs.warp import colliding_pairs

    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(200):
        model = random_tree(rng)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        found = {
            (*sorted(geoms), dim)
            for geoms, dim in zip(
                data.contact.geom.tolist(), data.contact.dim.tolist(), strict=True
            )
        }
        pairs = [(min(a, b), max(a, b), dim) for a, b, dim in colliding_pairs(model)]
        assert set(pairs) == found
        assert len(pairs) == len(found) == data.ncon
        seen += data.ncon
    assert seen > 2000


GEOMS: Mapping[str, str] = {
    "plane": 'type="plane" size="5 5 .1"',
    "hfield": 'type="hfield" hfield="hills"',
    "sphere": 'type="sphere" size=".2"',
    "capsule": 'type="capsule" size=".1 .3"',
    "ellipsoid": 'type="ellipsoid" size=".2 .1 .3"',
    "cylinder": 'type="cylinder" size=".2 .3"',
    "box": 'type="box" size=".2 .3 .25"',
    "mesh": 'type="mesh" mesh="block"',
}
ASSETS = """<asset>
<mesh name="block" vertex="0 0 0 .4 0 0 0 .4 0 0 0 .4 .4 .4 0 .4 .4 .4 .4 0 .4 0 .4 .4"/>
<hfield name="hills" nrow="20" ncol="20" size="1 1 .3 .1"/></asset>"""


@needs_warp
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pair
        for pair in itertools.combinations_with_replacement(GEOMS, 2)
        if pair[1] not in ("plane", "hfield")
    ],
)
def test_two_shapes_have_no_more_contacts_than_there_is_room_for(first: str, second: str) -> None:
    """In poses upright, by right angles and at random; what the table says is reached."""
    from envs.warp import CONTACTS, most_contacts

    flag = '<option><flag multiccd="enable"/></option>'
    scene = shapes(GEOMS[first], GEOMS[second])
    model = mujoco.MjModel.from_xml_string(f"<mujoco>{flag}{ASSETS}{scene}</mujoco>")
    rng = np.random.default_rng(0)
    model.hfield_data[:] = rng.random(len(model.hfield_data))
    data = mujoco.MjData(model)
    kinds = sorted(model.geom_type.tolist())
    room = most_contacts(kinds[1], kinds[0])
    assert room == most_contacts(kinds[0], kinds[1])
    most = 0
    for trial in range(600):
        for start in model.jnt_qposadr:
            turn = rng.normal(size=4)
            turn = (np.eye(4)[0], np.round(turn / np.abs(turn).max()), turn)[trial % 3]
            data.qpos[start : start + 3] = rng.uniform(-0.3, 0.3, 3)
            data.qpos[start + 3 : start + 7] = turn / np.linalg.norm(turn)
        mujoco.mj_forward(model, data)
        assert data.ncon <= room
        most = max(most, data.ncon)
    if (kinds[0], kinds[1]) in CONTACTS:
        assert most == room


# Too little of it.


def ants(heights: list[float]) -> tuple[mujoco.MjModel, Tensor, Tensor]:
    """The paper's ant; poses at these heights of the torso, feet in the floor at .25 m; at rest."""
    family = AntDir()
    model = model_of(family)
    qpos = torch.from_numpy(np.tile(family.start_positions(model), (len(heights), 1)))
    qpos[:, 2] = torch.tensor(heights)
    return model, qpos, torch.zeros(len(heights), model.nv)


@needs_warp
def test_worlds_without_room_for_constraints_diverge(capfd: pytest.CaptureFixture[str]) -> None:
    """Worlds 0 and 2 stand, with 16 rows of contact each; the others hang in the air."""
    model, qpos, qvel = ants([0.25, 5.0, 0.25, 7.0])
    ctrl = 0.1 * torch.ones(4, 8)
    roomy, tight = by_warp(model, 4), by_warp(model, 4, WarpSettings(njmax=3))
    capfd.readouterr()
    for physics in (roomy, tight):
        physics.set_state(qpos, qvel)
        physics.step(ctrl, 2)
    assert not roomy.diverged.any()
    assert roomy.trouble() == ""
    assert tight.diverged.tolist() == [True, False, True, False]
    assert tight.qvel[1::2].tolist() == roomy.qvel[1::2].tolist()
    tight.step(ctrl, 1, torch.tensor([False, True, True, True]))
    wanted = (
        "2 of 4 worlds had more constraints than mujoco_warp had room for: raise warp.njmax (now 3)"
    )
    assert tight.trouble() == wanted
    assert tight.trouble() == ""

    # What befalls worlds that are not stepped is nobody's trouble.
    tight.set_state(qpos, qvel)
    tight.step(ctrl, 2, torch.tensor([False, True, False, True]))
    assert not tight.diverged.any()
    assert tight.trouble() == ""
    assert tight.qvel[1::2].tolist() == roomy.qvel[1::2].tolist()
    # In the first of eight substeps alone: then the feet have left the floor.
    rising = qvel.clone()
    rising[:, 2] = 9.0
    tight.set_state(qpos, rising)
    tight.step(ctrl, 8)
    assert tight.diverged.tolist() == [True, False, True, False]
    assert "2 of 4" in tight.trouble()
    assert capfd.readouterr() == ("", "")


@needs_warp
def test_worlds_without_room_for_contacts_diverge(capfd: pytest.CaptureFixture[str]) -> None:
    """Four feet on the floor and room for one contact, on average over two worlds."""
    model, qpos, qvel = ants([0.25, 0.25])
    ctrl = torch.zeros(2, 8)
    physics = by_warp(model, 2, WarpSettings(nconmax=1))
    capfd.readouterr()
    physics.set_state(qpos, qvel)
    physics.step(ctrl, 1)
    assert physics.diverged.tolist() == [True, True]
    wanted = (
        "2 of 2 worlds had more contacts than mujoco_warp had room for: raise warp.nconmax (now 1)"
    )
    assert physics.trouble() == wanted
    assert physics.trouble() == ""
    qpos[:, 2] = 5.0
    physics.set_state(qpos, qvel)
    assert not physics.diverged.any()
    physics.step(ctrl, 1)
    assert not physics.diverged.any()
    assert physics.trouble() == ""
    assert capfd.readouterr() == ("", "")


@needs_warp
def test_no_world_goes_on_with_dropped_constraints_unnoticed() -> None:
    """A Runge-Kutta step makes constraints four times; it is wrong if once there was no room."""
    model = model_of(body("ant_dir"))
    roomy, tight = by_warp(model, N), by_warp(model, N, WarpSettings(njmax=7))
    wrong = 0
    for qpos, qvel, ctrl in moments("ant_dir", "paper"):
        for physics in (roomy, tight):
            physics.set_state(qpos, qvel)
            physics.step(ctrl, 1)
        assert not roomy.diverged.any()
        differs = (roomy.qvel != tight.qvel).any(1)
        assert not (differs & ~tight.diverged).any()
        wrong += int(differs.sum())
    assert wrong > 10


# Worlds that break down.


def each_entry(size: int, value: float) -> Tensor:
    """Changes (1 + size, size): none to the first world, each other one to an entry of its own."""
    return torch.cat([torch.zeros(1, size), torch.zeros(size, size).fill_diagonal_(value)])


@needs_warp
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e11])
def test_any_entry_that_is_no_number_breaks_its_world(value: float) -> None:
    """A world for each entry of the ant's position, velocity and control, quaternion included.

    It is put back at qpos0, at rest; set anew, it goes on like any other.
    """
    count = 1 + 15 + 14 + 8
    model, qpos, qvel = ants([0.25] * count)
    entries = each_entry(count - 1, value)
    at, speed, control = entries[:, :15], entries[:, 15:29], entries[:, 29:]
    ctrl = 0.3 * torch.ones(count, model.nu)
    physics = by_warp(model, count)
    physics.set_state(qpos, qvel)
    physics.step(ctrl, 1)
    assert not physics.diverged.any()
    expected = physics.qpos.clone(), physics.qvel.clone(), physics.sensor("center_of_mass")

    physics.set_state(qpos + at, qvel + speed)
    assert not physics.diverged.any()
    physics.step(ctrl + control, 1)
    # A control, if it is a number, is no more than the end of its range.
    broken = torch.arange(count) > 0
    broken &= (torch.arange(count) < 1 + 15 + 14) | bool(np.isnan(value))
    assert physics.diverged.tolist() == broken.tolist()
    assert physics.trouble() == ""
    whole = (physics.qpos, physics.qvel, physics.sensor("center_of_mass"))
    for got, wanted in zip(whole, expected, strict=True):
        assert torch.isfinite(got).all()
        assert got[0].tolist() == wanted[0].tolist()
    rest = torch.from_numpy(np.array(model.qpos0)).float().expand(count, -1)
    assert torch.equal(physics.qpos[broken], rest[broken])
    assert not physics.qvel[broken].any()
    # The middle of a body in its first pose: sensors are those of the state that it has now.
    data = physics.data(1)
    middle = data.subtree_com[model.body("torso").id].tolist()
    assert physics.sensor("center_of_mass")[1].tolist() == pytest.approx(middle, abs=1e-6)

    physics.step(ctrl, 1)
    assert not physics.diverged.any()
    physics.set_state(qpos, qvel)
    physics.step(ctrl, 1)
    assert not physics.diverged.any()
    again = (physics.qpos, physics.qvel, physics.sensor("center_of_mass"))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@needs_warp
@pytest.mark.parametrize("name", NAMES)
def test_a_world_does_not_depend_on_the_others(name: str) -> None:
    """Worlds 0 to 2 of eight, of which one breaks down and one hangs in the air, have the bits of
    three that are alone; and every run has them."""
    model = model_of(body(name))
    qpos, qvel, ctrl = (field[:8].clone() for field in moments(name, "paper")[0])
    height = 2 if name == "ant_dir" else 1
    qpos[:4, height] -= 0.15
    qpos[4, height] = 5.0
    qvel[5, 3] = float("nan")

    def run(count: int) -> Tensor:
        physics = by_warp(model, count)
        physics.set_state(qpos[:count], qvel[:count])
        states = []
        for step in range(6):
            physics.step(ctrl[:count].roll(step, 1), 2)
            parts = (physics.qpos, physics.qvel, physics.sensor("center_of_mass"))
            states.append(torch.cat(parts, 1).clone())
        return torch.stack(states)

    eight = run(8)
    assert torch.equal(run(8), eight)
    assert torch.equal(run(3), eight[:, :3])
    assert not torch.equal(eight[:, 0], eight[:, 1])


FIRST_CONTACT = int(mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS)
FIELDS_OF_A_ROW = ("type", "id", "pos", "margin", "D", "vel", "aref", "frictionloss", "J")


def shuffle_contacts(data: Any, rng: np.random.Generator) -> None:
    """Number the contacts of all worlds anew; those of one pair of geoms keep their order."""
    import warp as wp

    count = int(wp.to_torch(data.nacon)[0])
    new = torch.from_numpy(rng.permutation(count))
    pairs: dict[tuple[int, ...], list[int]] = {}
    whose = [
        wp.to_torch(data.contact.worldid)[:count, None],
        wp.to_torch(data.contact.geom)[:count],
    ]
    for contact, pair in enumerate(torch.cat(whose, 1).tolist()):
        pairs.setdefault(tuple(pair), []).append(contact)
    for contacts in pairs.values():
        new[contacts] = new[contacts].sort().values
    for value in vars(data.contact).values():
        if isinstance(value, wp.array) and value.shape[0] == data.naconmax:
            field = wp.to_torch(value)
            field[new] = field[:count].clone()
    rows = wp.to_torch(data.efc.id)
    touching = wp.to_torch(data.efc.type) >= FIRST_CONTACT
    touching &= torch.arange(rows.shape[1], device=rows.device) < wp.to_torch(data.nefc)[:, None]
    rows[touching] = new.to(rows)[rows[touching].long()]


def shuffle_rows(data: Any, rng: np.random.Generator) -> None:
    """Put the rows of constraints in an order as a GPU's threads might make them in.

    Limits and contacts change places, each among themselves; the rows of a contact stay together.
    """
    import warp as wp

    fields = [wp.to_torch(getattr(data.efc, name)) for name in FIELDS_OF_A_ROW]
    kinds, ids = fields[0].cpu(), fields[1].cpu()
    addresses = wp.to_torch(data.contact.efc_address)
    for world, count in enumerate(wp.to_torch(data.nefc).tolist()):
        source = [(int(kinds[world, row]), int(ids[world, row])) for row in range(count)]
        blocks = [list(rows) for _, rows in itertools.groupby(range(count), source.__getitem__)]
        limits = [rows for rows in blocks if source[rows[0]][0] < FIRST_CONTACT]
        contacts = [rows for rows in blocks if source[rows[0]][0] >= FIRST_CONTACT]
        for some in (limits, contacts):
            rng.shuffle(some)
        order = list(itertools.chain(*limits, *contacts))
        for field in fields:
            field[world, :count] = field[world, order]
        for rows in contacts:
            for which, row in enumerate(rows):
                addresses[source[row][1], which] = order.index(row)


def check_rows(data: Any) -> None:
    """What stands in a row belongs together, and every contact knows its rows.

    `margin` is to be the row's depth and `frictionloss` its speed, which nothing reads any more.
    """
    import warp as wp

    efc = {name: wp.to_torch(getattr(data.efc, name)) for name in FIELDS_OF_A_ROW}
    contact = {name: wp.to_torch(getattr(data.contact, name)) for name in ("efc_address", "dist")}
    qvel = wp.to_torch(data.qvel)
    for world, count in enumerate(wp.to_torch(data.nefc).tolist()):
        assert torch.equal(efc["margin"][world, :count], efc["pos"][world, :count])
        assert torch.equal(efc["frictionloss"][world, :count], efc["vel"][world, :count])
        speeds = efc["J"][world, :count, : qvel.shape[1]] @ qvel[world]
        torch.testing.assert_close(efc["vel"][world, :count], speeds, rtol=1e-4, atol=1e-4)
        for row in range(count):
            if efc["type"][world, row] >= FIRST_CONTACT:
                number = efc["id"][world, row]
                first = int(contact["efc_address"][number, 0])
                assert contact["efc_address"][number, row - first] == row
                depth = float(contact["dist"][number])
                assert efc["pos"][world, row].item() == pytest.approx(depth, abs=1e-6)


@needs_warp
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_which_constraint_was_made_first(
    name: str, deterministic: bool
) -> None:
    """Of bodies that stand, with limits and many contacts, whose rows come in any order.

    Where no order is asked for they do depend on it, so that this can be seen at all.
    """
    import warp as wp

    from envs.warp import WarpPhysics

    model = model_of(body(name))
    qpos, qvel, ctrl = (field[:16].clone() for field in moments(name, "paper")[0])
    qpos[:, 2 if name == "ant_dir" else 1] -= 0.15
    settings = WarpSettings(deterministic=deterministic)

    def run(seed: int | None) -> tuple[Tensor, Tensor]:
        inner = WarpPhysics(model, 16, device=DEVICE, settings=settings)
        made = inner._model.callback.control
        rng = np.random.default_rng(seed)

        def shuffled(its_model: Any, data: Any) -> None:
            if seed is not None:
                shuffle_contacts(data, rng)
                shuffle_rows(data, rng)
            wp.copy(data.efc.margin, data.efc.pos)
            wp.copy(data.efc.frictionloss, data.efc.vel)
            made(its_model, data)
            check_rows(data)

        inner._model.callback.control = shuffled
        physics = physics_on_host(inner)
        physics.set_state(qpos, qvel)
        for step in range(4):
            physics.step(ctrl.roll(step, 1), 1)
        assert not physics.diverged.any()
        return torch.cat([physics.qpos, physics.qvel], 1), home(wp.to_torch(inner._data.nefc))

    as_made, rows = run(None)
    assert rows.max() >= 8
    again = [run(seed)[0] for seed in range(3)]
    assert all(torch.equal(other, as_made) for other in again) == deterministic
    for other in again:
        torch.testing.assert_close(other, as_made, rtol=1e-2, atol=1e-2)


@needs_warp
@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_asked_of_the_simulator(deterministic: bool) -> None:
    """All of it or none. On a CPU, one thread adds in one order anyway."""
    from mujoco_warp import DeterminismType

    from envs.warp import WarpPhysics

    model, _, _ = ants([1.0])
    settings = WarpSettings(deterministic=deterministic)
    physics = WarpPhysics(model, 1, device=DEVICE, settings=settings)
    wanted = DeterminismType.ALL if deterministic else DeterminismType.NONE
    assert physics._model.opt.deterministic == wanted


# Settings, and what is not installed.


@pytest.mark.parametrize("value", [-1, 100_001])
def test_settings_are_checked(value: int) -> None:
    for fine in (0, 1, 100_000):
        settings = WarpSettings(njmax=fine, nconmax=fine)
        assert (settings.njmax, settings.nconmax) == (fine, fine)
    with pytest.raises(ValueError, match=rf"warp\.njmax must be between 0 and 100000, got {value}"):
        WarpSettings(njmax=value)
    with pytest.raises(
        ValueError, match=rf"warp\.nconmax must be between 0 and 100000, got {value}"
    ):
        WarpSettings(nconmax=value)


@needs_warp
@pytest.mark.parametrize(
    ("simulator", "warp"), [("4.0.0", "4.0.0"), ("3.10.0", "3.10.0.3"), ("3.17.0", "3.17.0.1")]
)
def test_releases_that_fit(simulator: str, warp: str) -> None:
    from envs.warp import check_release

    check_release(simulator, warp)


@needs_warp
@pytest.mark.parametrize(
    ("simulator", "warp"),
    [("4.0.0", "3.17.0"), ("3.17.0", "4.0.0"), ("3.10.0", "3.10.1"), ("3.1.1", "3.1.10")],
)
def test_releases_that_do_not(simulator: str, warp: str) -> None:
    from envs.warp import check_release

    with pytest.raises(ImportError) as caught:
        check_release(simulator, warp)
    message = str(caught.value)
    assert f"mujoco {simulator} and mujoco-warp {warp}" in message
    assert message.endswith(f"pip install mujoco-warp=={simulator}")


def not_installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


def of_another_release(name: str) -> str:
    return "3.9.1"


def of_this_release(name: str) -> str:
    return str(mujoco.__version__)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (not_installed, "needs mujoco-warp, which is not installed: "),
        (of_another_release, f"mujoco {mujoco.__version__} and mujoco-warp 3.9.1: "),
        # Its record is there and its files are not.
        (of_this_release, "needs mujoco-warp, which is not installed: "),
    ],
)
def test_without_the_package_the_cure_is_named(
    version: Callable[[str], str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fresh copy of envs/warp.py, which is imported when worlds are made and not before."""
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "warp", None)
    monkeypatch.delitem(sys.modules, "envs.warp", raising=False)
    monkeypatch.delattr(envs, "warp", raising=False)
    family = AntDir()
    with pytest.raises(ImportError) as caught:
        family.make_device_worlds(2, device="cpu", settings=WarpSettings())
    message = str(caught.value)
    assert said in message
    assert message.endswith(f"pip install mujoco-warp=={mujoco.__version__}")
    assert "envs.warp" not in sys.modules


# Families.


class TorchDraws:
    """Random numbers for `count` episodes, by torch."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(4)

    def normal(self, size: int) -> Tensor:
        return torch.randn(self.count, size, generator=self.generator)

    def uniform(self, size: int) -> Tensor:
        return torch.rand(self.count, size, generator=self.generator)


class Scripted:
    """Two episodes' numbers .125, .25, .375 ... in the order in which they are drawn."""

    def __init__(self) -> None:
        self.drawn = 0
        self.asked: list[str] = []

    def _next(self, kind: str, size: int) -> Tensor:
        self.asked.append(f"{kind} {size}")
        first, self.drawn = self.drawn, self.drawn + 2 * size
        return 0.125 * torch.arange(first + 1, self.drawn + 1).reshape(2, size)

    def normal(self, size: int) -> Tensor:
        return self._next("normal", size)

    def uniform(self, size: int) -> Tensor:
        return self._next("uniform", size)


STARTS: Mapping[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "paper": ("normal", lambda drawn: 0.01 * drawn),
    "gymnasium": ("uniform", lambda drawn: -0.1 + 0.2 * drawn),
}
"""How positions are drawn, and what becomes of the numbers."""


@pytest.mark.parametrize("protocol", STARTS)
@pytest.mark.parametrize("name", NAMES)
def test_starts_are_drawn_for_many_as_for_one(name: str, protocol: str) -> None:
    """Positions, then velocities, by the numbers; and 20,000 have the moments of `draw_start`."""
    family = body(name, protocol)
    nq, nv = family.state_sizes
    kind, shape = STARTS[protocol]
    script = Scripted()
    starts = family.draw_starts(script)
    assert script.asked == [f"{kind} {nq}", f"normal {nv}"]
    fresh = Scripted()
    torch.testing.assert_close(starts[:, :nq], shape(fresh.normal(nq)))
    torch.testing.assert_close(starts[:, nq:], 0.1 * fresh.normal(nv))

    count = 20_000
    many = family.draw_starts(TorchDraws(count))
    assert many.dtype == torch.float32
    rng = np.random.default_rng(0)
    one_by_one = np.stack([family.draw_start(rng) for _ in range(count)])
    assert tuple(many.shape) == one_by_one.shape
    for part, width in ((slice(0, nq), decided(family.position_noise)), (slice(nq, None), 0.1)):
        got, wanted = many.double().numpy()[:, part], one_by_one[:, part]
        # Five standard errors of a column's mean and of its standard deviation.
        assert np.abs(got.mean(0) - wanted.mean(0)).max() < 5 * width * (2 / count) ** 0.5
        assert np.abs(got.std(0) - wanted.std(0)).max() < 5 * width / count**0.5
        assert np.abs(np.corrcoef(got.T) - np.eye(got.shape[1])).max() < 5 / count**0.5
    if protocol == "gymnasium":
        assert 0.0999 < many[:, :nq].abs().max() <= 0.1


def test_a_point_starts_without_numbers() -> None:
    family = Navigation2D()
    assert family.draw_starts(TorchDraws(3)).shape == (3, 0)
    assert family.draw_start(np.random.default_rng(0)).shape == (0,)


@needs_warp
@pytest.mark.parametrize("name", NAMES)
def test_a_reset_takes_starts_as_tensors(name: str) -> None:
    """Observations and rewards are those of `make_worlds` to float32.

    Where some worlds are reset the others keep task and state: it is as if all had been given
    what each of them has.
    """
    family = body(name)
    rng = np.random.default_rng(2)
    old, new = (np.stack([family.draw_start(rng) for _ in range(3)]) for _ in range(2))
    one, other = (torch.from_numpy(task).repeat(3, 1) for task in family.spread_tasks(2))
    where = np.array([True, False, True])
    starts = np.where(where[:, None], new, old)
    tasks = torch.where(torch.from_numpy(where[:, None]), other, one)
    warp = worlds_on_host(family.make_device_worlds(3, device=DEVICE, settings=WarpSettings()))
    assert (warp.count, warp.device) == (3, numbered(DEVICE))
    near = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    with family.make_worlds(3, threads=1) as plain:
        first = warp.reset(one, torch.from_numpy(old).float())
        assert first.dtype == torch.float32
        near(first, plain.reset(one, old))
        some = warp.reset(other, torch.from_numpy(new).float(), torch.from_numpy(where))
        near(some, plain.reset(tasks, starts))
        actions = torch.zeros(3, len(family.action_columns))
        got, wanted = warp.step(actions), plain.step(actions)
    assert got.rewards.dtype == torch.float32
    torch.testing.assert_close(got.rewards, wanted.rewards, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.measures, wanted.measures, rtol=1e-4, atol=1e-4)
    warp.close()


def test_points_on_a_device_are_the_points_they_were() -> None:
    """Reset and stepped, all or some of them, to the goal and elsewhere.

    Bit for bit, but for a distance on a GPU.
    """
    family = Navigation2D(goal_radius=0.1)
    plain = family.make_worlds(4)
    device = worlds_on_host(family.make_device_worlds(4, device=DEVICE, settings=WarpSettings()))
    assert (device.count, device.device) == (4, numbered(DEVICE))
    rounding = 0.0 if device.device.type == "cpu" else 1e-6
    rng = np.random.default_rng(3)
    tasks = torch.from_numpy(family.sample_tasks(4, rng))
    tasks[0] = 0.15
    masks = (None, torch.tensor([True, False, True, False]))
    ended = 0
    for reset_mask, mask in itertools.product(masks, masks):
        first = plain.reset(tasks, np.zeros((4, 0)), reset_mask)
        assert torch.equal(device.reset(tasks, torch.zeros(4, 0), reset_mask), first)
        for _ in range(3):
            actions = torch.from_numpy(rng.normal(0.05, 0.1, (4, 2))).float()
            wanted, got = plain.step(actions, mask), device.step(actions, mask)
            for field, a, b in zip(Transition._fields, got, wanted, strict=True):
                width = rounding if field in ("rewards", "measures") else 0.0
                torch.testing.assert_close(a, b, rtol=width, atol=width)
            ended += int(wanted.terminated.sum())
        tasks = tasks.roll(1, 0)
    assert ended > 0
    assert device.trouble() == ""

    def body() -> None:
        raise AssertionError("not run")

    assert device.as_graph(body) is body


def test_a_family_without_device_worlds_says_so() -> None:
    family: TaskFamily = pendulum()
    with pytest.raises(
        FamilyError, match="gymnasium is simulated on the CPU only: use physics cpu"
    ):
        family.make_device_worlds(2, device="cpu", settings=WarpSettings())
    draws: Draws = TorchDraws(2)
    with pytest.raises(
        FamilyError, match="gymnasium is simulated on the CPU only: use physics cpu"
    ):
        family.draw_starts(draws)

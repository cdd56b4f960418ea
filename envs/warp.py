"""A batch of worlds of one MuJoCo model on a GPU, by mujoco_warp.

The only module that touches warp. What `envs/physics.py` does on CPU threads in float64, this does
in float32 on the device, where the state stays: tensors are views of mujoco_warp's own arrays. One
step from the same state agrees with MuJoCo's to rounding; episodes agree in distribution only.

mujoco_warp goes on with worlds that are not finite and drops contacts it has no room for; both are
looked for here in every step, on the device, and such worlds count as diverged.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

import mujoco
import numpy as np
import torch
from torch import Tensor

from envs.family import Floats, WarpSettings

CURE = "pip install mujoco-warp=={release}"


def check_release(simulator: str, warp: str) -> None:
    """Raise ImportError unless mujoco and mujoco-warp are of one release, as 3.17.0 and 3.17.0.1.

    A release's models and options are those that its mujoco_warp reads.
    """
    if warp.split(".")[:3] != simulator.split(".")[:3]:
        raise ImportError(
            f"physics warp needs mujoco and mujoco-warp of one release, and here are mujoco "
            f"{simulator} and mujoco-warp {warp}: {CURE.format(release=simulator)}"
        )


try:
    _found = metadata.version("mujoco-warp")
    check_release(mujoco.__version__, _found)
    import warp as wp

    # It would list devices and every kernel that it compiles on the terminal.
    wp.config.log_level = wp.LOG_WARNING
    wp.init()
    import mujoco_warp as mjw
except (metadata.PackageNotFoundError, ModuleNotFoundError) as missing:
    raise ImportError(
        "physics warp needs mujoco-warp, which is not installed: "
        + CURE.format(release=mujoco.__version__)
    ) from missing

LARGEST_VALUE = 1e10
"""MuJoCo's mjMAXVAL: a larger position, velocity or acceleration is a simulation broken down."""

NO_ROOM: Mapping[str, int] = {
    "njmax": int(mjw.OverflowType.NEFC | mjw.OverflowType.NJMAX_NNZ),
    "nconmax": int(
        mjw.OverflowType.BROADPHASE
        | mjw.OverflowType.NARROWPHASE
        | mjw.OverflowType.CCD
        | mjw.OverflowType.HFIELD
    ),
}
"""Bits that mujoco_warp sets in a world where it dropped something, by the setting to raise. Of
the others, those that rigid bodies can raise say that a solver stopped at its iteration limit, as
MuJoCo's does without a word."""

PLANE, HEIGHTS, SPHERE, CAPSULE, BOX = (
    int(kind)
    for kind in (
        mujoco.mjtGeom.mjGEOM_PLANE,
        mujoco.mjtGeom.mjGEOM_HFIELD,
        mujoco.mjtGeom.mjGEOM_SPHERE,
        mujoco.mjtGeom.mjGEOM_CAPSULE,
        mujoco.mjtGeom.mjGEOM_BOX,
    )
)
CONTACTS: Mapping[tuple[int, int], int] = {
    (PLANE, SPHERE): 1,
    (PLANE, CAPSULE): 2,
    (PLANE, BOX): 4,
    (SPHERE, SPHERE): 1,
    (SPHERE, CAPSULE): 1,
    (SPHERE, BOX): 1,
    (CAPSULE, CAPSULE): 2,
    (CAPSULE, BOX): 2,
}
"""The most contacts of a pair of geoms, by their types in ascending order."""
MOST_CONTACTS = 8
"""Of any other pair but one with a height field."""

EQUALITY_ROWS: Mapping[int, int] = {
    int(mujoco.mjtEq.mjEQ_CONNECT): 3,
    int(mujoco.mjtEq.mjEQ_WELD): 6,
}
"""Rows of an equality constraint by type; one for any other."""


def colliding_pairs(model: mujoco.MjModel) -> Iterator[tuple[int, int, int]]:
    """Yield the pairs of geoms that MuJoCo lets collide, and the most dimensions of a contact.

    Those are the pairs that the model names, and of the others those that pass its filters.
    """
    firsts, seconds = model.pair_geom1.tolist(), model.pair_geom2.tolist()
    named = {(min(p), max(p)) for p in zip(firsts, seconds, strict=True)}
    yield from zip(firsts, seconds, model.pair_dim.tolist(), strict=True)
    excluded = set(model.exclude_signature.tolist())
    filters_parents = not model.opt.disableflags & int(mujoco.mjtDisableBit.mjDSBL_FILTERPARENT)
    for one, two in itertools.combinations(range(model.ngeom), 2):
        bodies = sorted((int(model.geom_bodyid[one]), int(model.geom_bodyid[two])))
        welds = [int(model.body_weldid[b]) for b in bodies]
        parents = [int(model.body_weldid[model.body_parentid[w]]) for w in welds]
        related = 0 not in welds and (welds[0] == parents[1] or welds[1] == parents[0])
        willing = (model.geom_contype[one] & model.geom_conaffinity[two]) or (
            model.geom_contype[two] & model.geom_conaffinity[one]
        )
        if (
            willing
            and welds[0] != welds[1]
            and model.body_dofnum[welds].any()
            and not (filters_parents and related)
            and (bodies[0] << 16) + bodies[1] not in excluded
            and (one, two) not in named
        ):
            yield one, two, int(max(model.geom_condim[one], model.geom_condim[two]))


def most_contacts(one: int, two: int) -> int:
    """Return how many contacts geoms of two types can have at the most."""
    kinds = (min(one, two), max(one, two))
    if HEIGHTS in kinds:
        return int(mujoco.mjMAXCONPAIR)
    return CONTACTS.get(kinds, MOST_CONTACTS)


def room(model: mujoco.MjModel) -> WarpSettings:
    """Return the most contacts and constraint rows that a world of the model can have.

    Every pair of geoms that may collide does, with as many contacts as its shapes can have, and
    every joint is at its limit. No pose needs as much, and that is the margin.
    """
    contacts, rows = 0, 0
    pyramidal = model.opt.cone == int(mujoco.mjtCone.mjCONE_PYRAMIDAL)
    for one, two, directions in colliding_pairs(model):
        found = most_contacts(int(model.geom_type[one]), int(model.geom_type[two]))
        contacts += found
        rows += found * (2 * (directions - 1) if pyramidal and directions > 1 else directions)
    rows += sum(EQUALITY_ROWS.get(int(kind), 1) for kind in model.eq_type)
    rows += int(np.count_nonzero(model.dof_frictionloss))
    rows += int(np.count_nonzero(model.tendon_frictionloss))
    rows += int(np.count_nonzero(model.jnt_limited)) + int(np.count_nonzero(model.tendon_limited))
    return WarpSettings(nconmax=max(1, contacts), njmax=max(1, rows))


@wp.kernel(enable_backward=False)  # type: ignore[untyped-decorator]
def _align_capsules(
    found: wp.array[int],
    geoms: wp.array[wp.vec2i],
    worlds: wp.array[int],
    kinds: wp.array[int],
    rotations: wp.array2d[wp.mat33],
    frames: wp.array[wp.mat33],
) -> None:
    contact = wp.tid()
    if contact >= found[0]:
        return
    pair = geoms[contact]
    if kinds[pair[0]] != wp.static(PLANE) or kinds[pair[1]] != wp.static(CAPSULE):
        return
    frame = frames[contact]
    normal = wp.vec3(frame[0, 0], frame[0, 1], frame[0, 2])
    rotation = rotations[worlds[contact], pair[1]]
    axis = wp.vec3(rotation[0, 2], rotation[1, 2], rotation[2, 2])
    along = axis - normal * wp.dot(normal, axis)
    length = wp.length(along)
    if length < 1e-6:
        return
    along = along / length
    across = wp.cross(normal, along)
    frames[contact] = wp.matrix_from_rows(normal, along, across)


def align_capsules(model: mjw.Model, data: mjw.Data) -> None:
    """Turn a capsule's contacts with a plane so that friction acts along and across the capsule.

    MuJoCo does, whichever way the capsule points; mujoco_warp leaves those within 30 degrees of the
    plane's normal in the world's directions. With a pyramid of friction, whose sides are not alike,
    an ant that stands on its feet would be another ant.
    """
    wp.launch(
        _align_capsules,
        dim=data.naconmax,
        inputs=[
            data.nacon,
            data.contact.geom,
            data.contact.worldid,
            model.geom_type,
            data.geom_xmat,
        ],
        outputs=[data.contact.frame],
    )


@wp.kernel(enable_backward=False)  # type: ignore[untyped-decorator]
def _notice_overflow(
    rows: wp.array[int],
    njmax: int,
    pairs: wp.array[int],
    contacts: wp.array[int],
    naconmax: int,
    overflow: wp.array[int],
) -> None:
    world = wp.tid()
    if rows[world] > njmax:
        overflow[world] = overflow[world] | wp.static(int(mjw.OverflowType.NEFC))
    if pairs[0] > naconmax or contacts[0] > naconmax:
        overflow[world] = overflow[world] | wp.static(int(mjw.OverflowType.NARROWPHASE))


def notice_overflow(model: mjw.Model, data: mjw.Data) -> None:
    """Set the bits of worlds that have no room, each time that constraints are made.

    mujoco_warp looks once a step, after the last of a Runge-Kutta step's four stages: what an
    ant had no room for in the others would go unnoticed, and a third of its steps with it.
    """
    wp.launch(
        _notice_overflow,
        dim=data.nworld,
        inputs=[data.nefc, data.njmax, data.ncollision, data.nacon, data.naconmax],
        outputs=[data.overflow],
    )


@wp.func  # type: ignore[untyped-decorator]
def _label(kind: int, row_id: int, geoms: wp.array[wp.vec2i], ngeom: int) -> int:
    """What a row is of, whatever number its contact has: the pair of geoms, or the id itself."""
    if kind < wp.static(int(mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS)):
        return row_id
    pair = geoms[row_id]
    return int(pair[0]) * ngeom + int(pair[1])


@wp.kernel(enable_backward=False)  # type: ignore[untyped-decorator]
def _rank_rows(
    rows: wp.array[int],
    njmax: int,
    ngeom: int,
    geoms: wp.array[wp.vec2i],
    kinds: wp.array2d[int],
    ids: wp.array2d[int],
    source: wp.array2d[int],
) -> None:
    world, row = wp.tid()  # type: ignore[misc]
    count = wp.min(rows[world], njmax)
    if row >= count:
        return
    kind, number = kinds[world, row], ids[world, row]
    label = _label(kind, number, geoms, ngeom)
    rank = int(0)  # noqa: RUF046, UP018  # a literal would not be a variable to warp
    for other in range(count):
        before = kinds[world, other] - kind
        if before == 0:
            before = _label(kind, ids[world, other], geoms, ngeom) - label
        if before == 0:
            # Contacts of one pair are numbered in the order in which they were found.
            before = ids[world, other] - number
        if before == 0:
            before = other - row
        if before < 0:
            rank += 1
    source[world, rank] = row


@wp.kernel(enable_backward=False)  # type: ignore[untyped-decorator]
def _take_rows(
    rows: wp.array[int],
    njmax: int,
    nv: int,
    source: wp.array2d[int],
    kinds: wp.array2d[int],
    ids: wp.array2d[int],
    addresses: wp.array2d[int],
    positions: wp.array2d[float],
    margins: wp.array2d[float],
    masses: wp.array2d[float],
    velocities: wp.array2d[float],
    references: wp.array2d[float],
    friction: wp.array2d[float],
    jacobian: wp.array3d[float],
    integers: wp.array3d[int],
    numbers: wp.array3d[float],
) -> None:
    world, row = wp.tid()  # type: ignore[misc]
    if row >= wp.min(rows[world], njmax):
        return
    old = source[world, row]
    number = ids[world, old]
    integers[world, row, 0] = kinds[world, old]
    integers[world, row, 1] = number
    if kinds[world, old] >= wp.static(int(mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS)):
        integers[world, row, 2] = old - addresses[number, 0]
    numbers[world, row, 0] = positions[world, old]
    numbers[world, row, 1] = margins[world, old]
    numbers[world, row, 2] = masses[world, old]
    numbers[world, row, 3] = velocities[world, old]
    numbers[world, row, 4] = references[world, old]
    numbers[world, row, 5] = friction[world, old]
    for dof in range(nv):
        numbers[world, row, 6 + dof] = jacobian[world, old, dof]


@wp.kernel(enable_backward=False)  # type: ignore[untyped-decorator]
def _put_rows(
    rows: wp.array[int],
    njmax: int,
    nv: int,
    integers: wp.array3d[int],
    numbers: wp.array3d[float],
    kinds: wp.array2d[int],
    ids: wp.array2d[int],
    addresses: wp.array2d[int],
    positions: wp.array2d[float],
    margins: wp.array2d[float],
    masses: wp.array2d[float],
    velocities: wp.array2d[float],
    references: wp.array2d[float],
    friction: wp.array2d[float],
    jacobian: wp.array3d[float],
) -> None:
    world, row = wp.tid()  # type: ignore[misc]
    if row >= wp.min(rows[world], njmax):
        return
    kind, number = integers[world, row, 0], integers[world, row, 1]
    kinds[world, row] = kind
    ids[world, row] = number
    if kind >= wp.static(int(mujoco.mjtConstraint.mjCNSTR_CONTACT_FRICTIONLESS)):
        addresses[number, integers[world, row, 2]] = row
    positions[world, row] = numbers[world, row, 0]
    margins[world, row] = numbers[world, row, 1]
    masses[world, row] = numbers[world, row, 2]
    velocities[world, row] = numbers[world, row, 3]
    references[world, row] = numbers[world, row, 4]
    friction[world, row] = numbers[world, row, 5]
    for dof in range(nv):
        jacobian[world, row, dof] = numbers[world, row, 6 + dof]


class RowOrder:
    """Puts the rows of constraints in one order, whichever thread of the GPU made them first.

    The solver sums over rows, so that their order is in its last bits. mujoco_warp has a place for
    this, and nothing in it (4.0). For models with a dense Jacobian.
    """

    def __init__(self, model: mjw.Model, data: mjw.Data) -> None:
        """Make room for the rows of a batch."""
        shape = (data.nworld, data.njmax)
        self._source = wp.empty(shape, dtype=int)
        # Kind, id, and which of its contact's rows.
        self._integers = wp.empty((*shape, 3), dtype=int)
        # The six numbers that are made for a row, and its Jacobian.
        self._numbers = wp.empty((*shape, 6 + model.nv), dtype=float)

    def __call__(self, model: mjw.Model, data: mjw.Data) -> None:
        """Order by kind, then by joint or pair of geoms, then as they were made."""
        efc, shape = data.efc, (data.nworld, data.njmax)
        sizes = [data.nefc, data.njmax, model.nv]
        wp.launch(
            _rank_rows,
            dim=shape,
            inputs=[data.nefc, data.njmax, model.ngeom, data.contact.geom, efc.type, efc.id],
            outputs=[self._source],
        )
        rows = [efc.type, efc.id, data.contact.efc_address, efc.pos, efc.margin, efc.D, efc.vel]
        rows += [efc.aref, efc.frictionloss, efc.J]
        kept = [self._integers, self._numbers]
        wp.launch(_take_rows, dim=shape, inputs=[*sizes, self._source, *rows], outputs=kept)
        wp.launch(_put_rows, dim=shape, inputs=[*sizes, *kept], outputs=rows)


def _out_of_bounds(*fields: Tensor) -> Tensor:
    """Return which worlds have an entry that MuJoCo would call a breakdown, (N,); (N, ...) each."""
    # Not a number compares false.
    return ~(torch.cat(fields, 1).abs() <= LARGEST_VALUE).all(1)


class WarpPhysics:
    """`Physics` by mujoco_warp, in float32; on a CPU it works too, one world after another.

    All worlds are stepped at once whatever `where` says; those left out are then put back.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        count: int,
        *,
        device: str | torch.device = "cuda",
        settings: WarpSettings | None = None,
    ) -> None:
        """Make `count` worlds with so much room for contacts; what is 0 is sized from the model."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        settings = settings or WarpSettings()
        enough = room(model)
        self.model = model
        self.count = count
        self._nconmax = settings.nconmax or enough.nconmax
        self._njmax = settings.njmax or enough.njmax
        self._device = torch.device(device)
        if str(self._device) == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._wp_device = wp.device_from_torch(self._device)
        self._streams: dict[int, wp.Stream] = {}
        with self._on_device():
            self._model = mjw.put_model(model)
            self._data = mjw.make_data(
                model, nworld=count, nconmax=self._nconmax, njmax=self._njmax
            )
            ordered = settings.deterministic and not self._model.is_sparse
            order = RowOrder(self._model, self._data) if ordered else None
        # The bits are read here; mujoco_warp would print a line a world and step.
        self._model.opt.warn_overflow = 0
        self._model.opt.deterministic = settings.deterministic
        self._model.callback.contactfilter = align_capsules

        def after_constraints(model: mjw.Model, data: mjw.Data) -> None:
            notice_overflow(model, data)
            if order is not None:
                order(model, data)

        # Called between the constraints and their solution, whatever its name.
        self._model.callback.control = after_constraints
        data = self._data
        self.qpos: Tensor = wp.to_torch(data.qpos)
        self.qvel: Tensor = wp.to_torch(data.qvel)
        self._ctrl: Tensor = wp.to_torch(data.ctrl)
        self._qacc: Tensor = wp.to_torch(data.qacc)
        self._warm_start: Tensor = wp.to_torch(data.qacc_warmstart)
        self._activation: Tensor = wp.to_torch(data.act)
        self._time: Tensor = wp.to_torch(data.time)
        # The solver multiplies rows of constraints that are gone by zero, which a NaN survives: it
        # would break a world down again after it was put back.
        jacobian: Tensor = wp.to_torch(data.efc.J)
        self._forgotten = (
            *(self._ctrl, self._qacc, self._warm_start, self._activation, self._time),
            jacobian,
        )
        self._overflow: Tensor = wp.to_torch(data.overflow)
        self._sensors: Tensor = wp.to_torch(data.sensordata)
        self._overflowed = torch.zeros_like(self._overflow)
        self.diverged = torch.zeros(count, dtype=torch.bool, device=self.device)
        self._qpos0 = torch.from_numpy(np.array(model.qpos0)).to(self.qpos)
        self._refresh_sensors()

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self._device

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Launch warp's kernels where torch's are launched, so that both keep one order."""
        with wp.ScopedDevice(self._wp_device):
            if not self._wp_device.is_cuda:
                yield
                return
            with wp.ScopedStream(self._stream(), sync_enter=False):
                yield

    def _stream(self) -> wp.Stream:
        """Return torch's present stream as warp's, always the same object for the same stream.

        Warp knows a stream that it captures by the object.
        """
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:
            self._streams[stream.cuda_stream] = wp.stream_from_torch(stream)
        return self._streams[stream.cuda_stream]

    def _mask(self, where: Tensor | None) -> Tensor:
        return torch.ones_like(self.diverged) if where is None else where

    def sensor(self, name: str) -> Tensor:
        """Return one sensor's readings of the present state, (N, size) float32, a copy."""
        sensor = self.model.sensor(name)
        start = int(sensor.adr[0])
        return self._sensors[:, start : start + int(sensor.dim[0])].clone()

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return one world's qpos (nq,) and qvel (nv,)."""
        return {
            "qpos": self.qpos[world].double().cpu().numpy(),
            "qvel": self.qvel[world].double().cpu().numpy(),
        }

    def data(self, world: int) -> mujoco.MjData:
        """Return a copy of one world with its derived fields computed, for drawing it."""
        data = mujoco.MjData(self.model)
        state = self.state(world)
        data.qpos[:], data.qvel[:] = state["qpos"], state["qvel"]
        data.ctrl[:] = self._ctrl[world].cpu().numpy()
        data.time = float(self._time[world])
        mujoco.mj_forward(self.model, data)
        return data

    def set_state(self, qpos: Tensor, qvel: Tensor, where: Tensor | None = None) -> None:
        """Set positions (N, nq) and velocities (N, nv), and forget solver state and overflows.

        A state that is not finite, or too large, counts as diverged in the next step.
        """
        chosen = self._mask(where)
        self._put(chosen, qpos, qvel)
        self.diverged = self.diverged & ~chosen
        self._refresh_sensors()

    def _put(self, chosen: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Set the state of worlds (N,) as if they had none before; (..., nq) and (..., nv)."""
        rows = chosen.unsqueeze(1)
        self.qpos.copy_(torch.where(rows, qpos.to(self.qpos), self.qpos))
        self.qvel.copy_(torch.where(rows, qvel.to(self.qvel), self.qvel))
        for field in self._forgotten:
            field.masked_fill_(chosen.reshape(-1, *[1] * (field.ndim - 1)), 0.0)

    def step(self, ctrl: Tensor, substeps: int, where: Tensor | None = None) -> None:
        """Apply controls (N, nu) for `substeps` steps of the model, and refresh the sensors."""
        kept = (self.qpos, self.qvel, self._qacc, self._warm_start, self._activation)
        before = [] if where is None else [field.clone() for field in kept]
        time_before = self._time.clone()
        self._ctrl.copy_(ctrl)
        # mujoco_warp would hide what is not finite here: it normalizes a quaternion, and clamps a
        # control.
        broken = _out_of_bounds(self.qpos, self.qvel) | self._ctrl.isnan().any(1)
        self._overflow.zero_()
        self._advance(substeps)
        stepped = self._mask(where)
        if where is not None:
            for field, old in zip(kept, before, strict=True):
                field.copy_(torch.where(where.unsqueeze(1), field, old))
            self._time.copy_(torch.where(where, self._time, time_before))
        broken = broken | _out_of_bounds(self.qpos, self.qvel, self._qacc)
        wanting = self._overflow & sum(NO_ROOM.values())
        self._overflowed.bitwise_or_(torch.where(stepped, wanting, 0))
        self.diverged = (broken | (wanting != 0)) & stepped
        # As MuJoCo does; what is not finite would keep the solver busy for all.
        self._put(self.diverged, self._qpos0, torch.zeros_like(self.qvel))
        self._refresh_sensors()

    def bare_step(self, ctrl: Tensor, substeps: int) -> None:
        """Let mujoco_warp step all worlds, and do nothing else: what speeds are measured against.

        As it comes: in any order of sums, without what is called back here, without sensors. The
        worlds are of no other use afterwards.
        """
        self._model.opt.deterministic = False
        self._model.callback.contactfilter = self._model.callback.control = None
        self._ctrl.copy_(ctrl)
        self._advance(substeps)

    def _advance(self, substeps: int) -> None:
        """Step all worlds; the sensors' own code is left out where a further step follows."""
        self._switch_sensors(on=False)
        with self._on_device():
            for _ in range(substeps):
                mjw.step(self._model, self._data)
        self._switch_sensors(on=True)

    def _switch_sensors(self, *, on: bool) -> None:
        bit = int(mjw.DisableBit.SENSOR)
        flags = self._model.opt.disableflags
        self._model.opt.disableflags = flags & ~bit if on else flags | bit

    def _refresh_sensors(self) -> None:
        """Compute the sensors of position and velocity at the present state."""
        if not self.model.nsensor:
            return
        with self._on_device():
            for stage in (
                mjw.kinematics,
                mjw.com_pos,
                mjw.com_vel,
                mjw.sensor_pos,
                mjw.sensor_vel,
            ):
                stage(self._model, self._data)

    def trouble(self) -> str:
        """Return which room did not suffice since this was last asked, and what to raise."""
        bits = self._overflowed.to("cpu", copy=True)
        self._overflowed.zero_()
        now = {"njmax": self._njmax, "nconmax": self._nconmax}
        what = {"njmax": "constraints", "nconmax": "contacts"}
        parts = [
            f"{int((bits & mask != 0).sum())} of {self.count} worlds had more {what[name]} than "
            f"mujoco_warp had room for: raise warp.{name} (now {now[name]})"
            for name, mask in NO_ROOM.items()
            if bool((bits & mask).any())
        ]
        return "; ".join(parts)

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `body` does, on a GPU as one launch of a CUDA graph.

        `body` is run before it is captured, and must be harmless then. Where it cannot be captured
        a warning says why, and `body` itself comes back. `diverged` is not renewed by a launch:
        what `body` makes of it is.
        """
        if not self._wp_device.is_cuda:
            return body
        try:
            return self._capture(body)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(
                f"a control step cannot be captured in a CUDA graph, and is launched kernel by "
                f"kernel, which is slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return body

    def _capture(self, body: Callable[[], None]) -> Callable[[], None]:
        # The solver's loops end the stream's capture and begin another, and torch knows its own
        # captures by their number. So warp captures, and the memory of torch's tensors in the graph
        # is kept from others by a pool that nothing else takes from.
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        pool = torch.cuda.MemPool()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool, self.device):
            for _ in range(2):
                body()
            stream.synchronize()
            with wp.ScopedCapture(stream=self._stream()) as capture:
                body()
        torch.cuda.current_stream(self.device).wait_stream(stream)

        def launch(graph: object = capture.graph, memory: object = pool) -> None:
            """Launch the graph on torch's stream; `memory` is what it works in."""
            wp.capture_launch(graph, stream=self._stream())

        return launch

"""The contract of a field that TCEP relaxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from topotune.errors import PluginError
from topotune.tcep.fields import Field
from topotune.testing.check import check
from topotune.testing.rest import damped_energy, damped_flow, energy_slope, jacobian, rest

_SAMPLES = 3
_MOST_ENTRIES = 200
"""Entries of the state that a finite difference is taken of."""


class KnownEquilibrium(NamedTuple):
    """A case with a known answer.

    Attributes:
        drive: (B, N, D).
        damping: lambda.
        tokens: (B, N, D), where the damped flow must come to rest.
    """

    drive: Tensor
    damping: float
    tokens: Tensor


class EnergyContract:
    """What topotune expects of a :class:`topotune.tcep.fields.Field`.

    Inherit it in a class whose name starts with ``Test`` and set :attr:`field`, or override
    :meth:`make_field`. Keep the field small, some tens of numbers of state: Jacobians are dense.
    All checks run in float64. Of a field that says ``conservative = False``, those that speak of
    an energy do not apply.

    Attributes:
        field: the class to check, constructed with :attr:`options`.
        options: keyword arguments of its constructor.
        damping: lambda, enough for the damped flow to come to rest.
        step: length of an Euler step along which the energy must fall.
    """

    field: ClassVar[Callable[..., Field]]
    options: ClassVar[Mapping[str, Any]] = {}
    damping: ClassVar[float] = 2.0
    step: ClassVar[float] = 0.01

    def make_field(self) -> Field:
        """A new field; torch's generator is seeded before."""
        return type(self).field(**self.options)

    def known_equilibrium(self, field: Field) -> KnownEquilibrium | None:
        """A case whose answer you know, for a field that :meth:`make_field` made; None: no case.

        The weights may be read, or written first.
        """
        return None

    def test_shapes(self) -> None:
        """Everything is as long as the field says, and a relaxation starts with the drive's shape.

        The tokens lie first in the state, flattened: the damping acts on them.
        """
        field, state, drive = self._case()
        count = field.tokens * field.width
        check(field.size >= count, f"size is {field.size}, less than tokens * width = {count}")
        start = field.initial(drive)
        _shaped("initial()", start, (_SAMPLES, field.size))
        _shaped("flow()", field.flow(state, drive), (_SAMPLES, field.size))
        _shaped("metric()", field.metric(state), (_SAMPLES, field.size))
        _shaped("features()", field.features(state), (_SAMPLES, field.feature_size))
        tokens = field.split(state)[0]
        eliminated = field.eliminated(tokens, drive, state)
        _shaped("eliminated()", eliminated, tuple(tokens.shape))
        if field.conservative:
            _shaped("energy()", field.energy(state, drive), (_SAMPLES,))

    def test_the_force_is_the_slope_of_the_energy(self) -> None:
        """``flow = -(1/G) dE/ds``, against central differences of the energy."""
        field, state, drive = self._case()
        if not field.conservative:
            return
        state, drive = state[:1], drive[:1]
        entries = torch.randperm(field.size)[:_MOST_ENTRIES]
        with torch.no_grad():
            force = -(field.metric(state) * field.flow(state, drive))[0, entries]
            slopes = torch.stack([energy_slope(field, state, drive, int(k)) for k in entries])
        off = (force - slopes).abs()
        worst = int(off.argmax())
        check(
            bool(off.max() <= 1e-7 * (1 + slopes.abs().max())),
            f"-G * flow is {force[worst]:g} at entry {entries[worst]} of the state, but the energy "
            f"rises there by {slopes[worst]:g} (finite difference): flow() is not -(1/G) dE/ds",
        )

    def test_the_jacobian_is_symmetric_in_the_metric(self) -> None:
        """A force that derives from an energy has a symmetric Jacobian."""
        field, state, drive = self._case()
        if not field.conservative:
            return
        drive = drive[:1]
        matrix = jacobian(lambda s: field.metric(s) * field.flow(s, drive), state[:1])
        off = (matrix - matrix.T).abs()
        row, column = divmod(int(off.argmax()), len(matrix))
        check(
            bool(off.max() <= 1e-9 * matrix.abs().max()),
            f"the Jacobian of G * flow is not symmetric: entry ({row}, {column}) is "
            f"{matrix[row, column]:g}, entry ({column}, {row}) is {matrix[column, row]:g}. "
            "No energy has this force; a field without one says conservative = False",
        )

    def test_the_metric_is_positive_and_one_number_on_tokens(self) -> None:
        """``G > 0``: the flow descends. On tokens it is the same number everywhere.

        Otherwise damping and recirculation, which act on tokens, would have no energy.
        """
        field, state, drive = self._case()
        one_number = field.metric(state)[0, 0]
        for place in (state, 10 * state, field.initial(drive)):
            metric = field.metric(place)
            check(bool((metric > 0).all()), f"metric() has an entry of {metric.min():g}, not > 0")
            tokens = metric[:, : field.tokens * field.width]
            check(
                not field.conservative or bool((tokens == one_number).all()),
                f"metric() lies between {tokens.min():g} and {tokens.max():g} on tokens: there it "
                "must be one number that does not depend on the state",
            )

    def test_it_rests_where_the_energy_is_flat(self) -> None:
        """The damped flow comes to rest from ``initial``, and there the energy has no slope."""
        field, _, drive = self._case()
        state = rest(field, drive, self.damping)
        if not field.conservative:
            return
        point = state.requires_grad_()
        (slope,) = torch.autograd.grad(
            damped_energy(field, point, drive, self.damping).sum(), point
        )
        check(
            bool(slope.abs().max() <= 1e-8 * (1 + field.metric(state).max())),
            f"where the damped flow is at rest, the energy still has a slope of "
            f"{slope.abs().max():g}: flow and energy have different equilibria",
        )

    def test_the_energy_falls(self) -> None:
        """Along small Euler steps the damped energy never rises."""
        field, _, drive = self._case()
        if not field.conservative:
            return
        state = field.initial(drive)
        with torch.no_grad():
            before = damped_energy(field, state, drive, self.damping)
            first = before
            for number in range(1, 201):
                state = state + self.step * damped_flow(field, state, drive, self.damping)
                after = damped_energy(field, state, drive, self.damping)
                rise = (after - before - 1e-12 * (1 + before.abs())).max()
                check(
                    bool(rise <= 0),
                    f"Euler step {number} of length {self.step:g} raises the energy by {rise:g}",
                )
                before = after
        check(bool((before < first).all()), "200 Euler steps do not lower the energy")

    def test_samples_do_not_mix(self) -> None:
        """A sample of a batch is treated as it would be alone: batches are cut and reordered."""
        field, state, drive = self._case()
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "flow": field.flow,
            "metric": lambda s, _: field.metric(s),
            "features": lambda s, _: field.features(s),
            "initial": lambda _, u: field.initial(u),
            "eliminated": lambda s, u: field.eliminated(field.split(s)[0], u, s),
        }
        if field.conservative:
            functions["energy"] = field.energy
        for name, function in functions.items():
            whole = function(state, drive)
            for i in range(_SAMPLES):
                alone = function(state[i : i + 1], drive[i : i + 1])[0]
                off = (whole[i] - alone).abs().max()
                check(
                    bool(off <= 1e-10 * (1 + alone.abs().max())),
                    f"{name}() of a sample in a batch differs by {off:g} from {name}() of it alone",
                )

    def test_the_drive_moves_it(self) -> None:
        """Another input, another flow."""
        field, state, drive = self._case()
        moved = (field.flow(state, drive + 1) - field.flow(state, drive)).abs()
        check(
            bool(moved.any()), "flow() is the same whatever the drive is: the input has no effect"
        )

    def test_every_parameter_has_an_effect(self) -> None:
        """All parameters change the energy's force: what does not is never trained."""
        field, state, drive = self._case()
        parameters = dict(field.named_parameters())
        if not parameters:
            return
        seen = field.metric(state) * field.flow(state, drive)
        aim = torch.randn_like(seen)
        # The zero makes it differentiable even when the field has detached everything.
        total = (seen * aim).sum() + 0.0 * torch.ones(1, requires_grad=True).sum()
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            check(
                gradient is not None and bool(gradient.any()),
                f"the parameter {name} has no effect on the flow",
            )
            check(
                gradient is not None and bool(torch.isfinite(gradient).all()),
                f"the derivative of the flow with respect to {name} is not finite",
            )

    def test_it_changes_nothing_and_repeats_itself(self) -> None:
        """Calls leave their arguments alone, draw nothing, and give the same without gradients."""
        field, state, drive = self._case()
        kept, generator = (state.clone(), drive.clone()), torch.get_rng_state()
        recorded = field.flow(state, drive)
        untouched = torch.equal(state, kept[0]) and torch.equal(drive, kept[1])
        check(untouched, "flow() writes to its arguments")
        drawn = not torch.equal(generator, torch.get_rng_state())
        check(not drawn, "flow() draws random numbers: noise is the learner's to add")
        with torch.no_grad():
            plain = field.flow(state, drive)
        with torch.inference_mode():
            evaluated = field.flow(state.clone(), drive.clone())
        check(
            torch.allclose(plain, recorded) and torch.allclose(evaluated, recorded),
            "flow() differs between recording gradients, no_grad and inference_mode",
        )

    def test_eliminated_agrees_with_the_flow_at_rest(self) -> None:
        """Where hidden units rest, ``eliminated`` is the tokens' part of the flow."""
        field, _, drive = self._case()
        state = rest(field, drive, self.damping)
        tokens = field.split(state)[0]
        flow = field.split(field.flow(state, drive))[0]
        off = (field.eliminated(tokens, drive, state) - flow).abs().max()
        check(
            bool(off <= 1e-7 * (1 + flow.abs().max())),
            f"eliminated() differs by {off:g} from the tokens' flow where hidden units are at rest",
        )

    def test_capped_matrices_are_parameters(self) -> None:
        """``capped`` names matrices or kernels of the field, or matrices a head; caps from 0."""
        field, _, _ = self._case()
        names = {id(p): name for name, p in field.named_parameters()}
        for item in field.capped():
            inside = id(item.weight) in names
            check(inside, "capped() holds a tensor that is no parameter of the field")
            try:
                item.check(type(field).__name__)
            except PluginError as error:
                check(False, f"{names[id(item.weight)]}: {error}")

    def test_the_known_equilibrium(self) -> None:
        """It comes to rest where :meth:`known_equilibrium` says."""
        field, _, _ = self._case()
        case = self.known_equilibrium(field)
        if case is None:
            return
        state = rest(field, case.drive.double(), case.damping)
        off = (field.split(state)[0] - case.tokens).abs().max()
        check(
            bool(off <= 1e-8 * (1 + case.tokens.abs().max())),
            f"the tokens come to rest {off:g} away from the known equilibrium",
        )

    def _case(self) -> tuple[Field, Tensor, Tensor]:
        """A field in float64, states (B, S) and drives (B, N, D), always the same."""
        torch.manual_seed(0)
        field = self.make_field().double()
        drive = torch.randn(_SAMPLES, field.tokens, field.width, dtype=torch.float64)
        start = field.initial(drive)
        return field, start + torch.randn_like(start), drive


def _shaped(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    shape = tuple(value.shape)
    check(shape == expected, f"{name} has shape {shape}, not {expected}")
    check(bool(torch.isfinite(value).all()), f"{name} is not finite")

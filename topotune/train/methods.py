"""The one registry of training methods, and how a spec finds its own."""

from __future__ import annotations

from topotune.errors import UnknownNameError
from topotune.optim import OPTIMIZERS
from topotune.plugins import is_import_path
from topotune.records import TrialSpec
from topotune.train.method import Method, OptimizerMethod
from topotune.train.tcep import TcepMethod

METHODS: dict[str, type[Method]] = {"tcep": TcepMethod}
"""Methods with a network and a learner of their own; any other name is an optimizer's."""


def build_method(spec: TrialSpec) -> Method:
    """The method that a spec names: a key of :data:`METHODS`, or an optimizer.

    Raises:
        UnknownNameError: neither of them, and no import path.
        UserError: the method refuses its parameters.
    """
    name = spec.method
    if name in METHODS:
        return METHODS[name](spec)
    if not is_import_path(name) and name not in OPTIMIZERS:
        raise UnknownNameError(
            "method",
            name,
            (*METHODS, *OPTIMIZERS),
            "or the import path of an optimizer, package.module:Class",
        )
    return OptimizerMethod(spec)

"""The front door: its names are pinned."""

from __future__ import annotations

import topotune


def test_the_public_names() -> None:
    assert topotune.__all__ == [
        "EpochReport",
        "Outcome",
        "Task",
        "TopologicalAdam",
        "TopotuneError",
        "TrialResult",
        "TrialSpec",
        "__version__",
        "run_trial",
    ]
    for name in topotune.__all__:
        assert getattr(topotune, name) is not None
    assert dir(topotune) == topotune.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(topotune, "TopologicalAdm")

"""What one trial of a search holds of the cluster, and how many of them run at once."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from topotune.config.space import Frozen, no_flag

_RAYS_OWN = ("cpu", "gpu", "memory", "object_store_memory")
"""Names that Ray gives a meaning to, whatever their case."""


class Resources(Frozen):
    """What one trial holds, and how many run at once.

    Attributes:
        cpus: CPU cores (and torch threads) a trial.
        gpus: GPUs a trial: a whole number, or a fraction below 1 for trials that share one;
            "auto": 1 if the cluster has or can get any, else 0.
        gpu_memory: the largest part of a GPU's memory that the trial's process may take, above 0
            and at most 1; "auto": the fraction of a GPU that it holds, and all of a whole one.
        custom: amounts of the cluster's custom resources, by name, that a trial holds.
        concurrency: trials at once; "auto": as many as the resources hold, nodes that an
            autoscaler may add included.
        priority: share of a cluster that several searches use at once: one of priority 2 gets
            twice as many trials at once as one of priority 1.
    """

    cpus: int = Field(default=1, ge=1)
    gpus: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    gpu_memory: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    custom: dict[
        str, Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(no_flag)]
    ] = Field(default_factory=dict)
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    priority: int = Field(default=1, ge=1, le=100)

    @field_validator("gpus")
    @classmethod
    def _whole_or_shared(cls, gpus: Literal["auto"] | float) -> Literal["auto"] | float:
        if gpus != "auto" and gpus > 1 and not float(gpus).is_integer():
            raise ValueError(
                f"a trial shares one GPU (a fraction below 1) or holds whole ones (got {gpus:g}); "
                f"write {math.floor(gpus)} or {math.ceil(gpus)}"
            )
        return gpus

    @field_validator("custom")
    @classmethod
    def _not_rays_own(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in custom:
            if not name or name.lower() in _RAYS_OWN or name.startswith("node:"):
                raise ValueError(
                    f"{name!r} is a name of Ray's own; write cpus or gpus, or the name of a custom "
                    "resource that its nodes were started with (ray start --resources)"
                )
        return custom

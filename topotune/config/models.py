"""The search file as frozen models: what is legal in each block, before anything is built. Rules
that involve several blocks stand in :mod:`topotune.config.rules`.

``topotune schema`` prints the JSON schema of :class:`SearchConfig`. Names of parameters in
``fixed``, ``space`` and ``warm_start`` share one namespace: a bare name (``lr``, ``eta``) is a
keyword argument of the method, ``model.X`` of the model, ``task.X`` of the task and ``train.X``
of the training loop (:class:`topotune.records.TrainOptions`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from topotune.config.budget import Budget, Limits, Resources
from topotune.config.space import PARAM_NAME, Frozen, Param, Scalar, no_flag, one_given
from topotune.errors import did_you_mean
from topotune.records import Value

SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PARAM_NAMES: dict[str, Any] = {"propertyNames": {"pattern": f"^{PARAM_NAME.pattern}$"}}


def _numbers(value: object) -> object:
    """Options as they are; their lists hold numbers, which true and false are not."""
    for inner in value.values() if isinstance(value, dict) else ():
        for item in inner if isinstance(inner, list) else ():
            no_flag(item)
    return value


Options: TypeAlias = Annotated[dict[str, Value], BeforeValidator(_numbers)]


class TaskConfig(Frozen):
    """What is learnt.

    Attributes:
        name: a built-in task or ``package.module:Class``.
        options: keyword arguments of the task.
        data_dir: where data sets lie or are downloaded to.
        download: whether missing data may be downloaded.
        split_seed: seed of the train / validation / test split; keep it equal between searches
            that are compared.
    """

    name: str
    options: Options = Field(default_factory=dict)
    data_dir: str | None = None
    download: bool = True
    split_seed: int = Field(default=0, ge=0, lt=2**63)


class ModelConfig(Frozen):
    """Which of the task's models; no name means the task's default."""

    name: str | None = None
    options: Options = Field(default_factory=dict)


class Objective(Frozen):
    """A metric of the last epoch (or of the trial) and where it should go."""

    metric: str
    direction: Literal["maximize", "minimize"]


class Bound(Frozen):
    """A constraint on a metric: at most ``max``, at least ``min``."""

    model_config = ConfigDict(json_schema_extra=one_given("max", "min"))

    max: float | None = Field(default=None, allow_inf_nan=False)
    min: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("a constraint needs max or min, such as {max: 1.2}")
        return self


SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random", "grid", "qmc")
PRUNERS = ("asha", "hyperband", "median", "none")


_OLD_NAMES = {"successive_halving": "asha"}


def _by_name(value: object) -> object:
    """A bare name stands for a block with that name and default options."""
    return {"name": value} if isinstance(value, str) else value


def _one_of(kind: str, known: tuple[str, ...]) -> AfterValidator:
    """A name out of a fixed set; an old one is read as its new one."""

    def check(name: str) -> str:
        name = _OLD_NAMES.get(name, name)
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, known)}")
        return name

    return AfterValidator(check)


SamplerName: TypeAlias = Annotated[
    str, _one_of("sampler", SAMPLERS), WithJsonSchema({"type": "string", "enum": [*SAMPLERS]})
]
PrunerName: TypeAlias = Annotated[
    str,
    _one_of("pruner", PRUNERS),
    WithJsonSchema({"type": "string", "enum": [*PRUNERS, *_OLD_NAMES]}),
]


class SamplerConfig(Frozen):
    """Who proposes the next trial.

    Attributes:
        name: tpe, gp, cmaes, nsga2, random, grid or qmc.
        startup_trials: random trials before a model-based sampler (tpe, gp, cmaes) takes over.
    """

    name: SamplerName = "tpe"
    startup_trials: int = Field(default=10, ge=1)


class PrunerConfig(Frozen):
    """Who stops a trial early.

    Attributes:
        name: asha (asynchronous successive halving), hyperband, median or none.
        min_epochs: no trial is stopped before it has trained this many epochs.
        reduction_factor: asha and hyperband keep one trial in this many at each rung.
        startup_trials: median waits for this many finished trials.
    """

    name: PrunerName = "asha"
    min_epochs: int = Field(default=1, ge=1)
    reduction_factor: int = Field(default=3, ge=2)
    startup_trials: int = Field(default=5, ge=1)


class TrainConfig(Frozen):
    """The training loop; see :class:`topotune.records.TrainOptions`."""

    batch_size: int = Field(default=64, ge=1)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    grad_clip: float | None = Field(default=None, gt=0)


class OverheadConfig(Frozen):
    """How the cost over Adam (of tcep: over backpropagation) is measured; see
    :class:`topotune.records.OverheadOptions`."""

    blocks: int = Field(default=9, ge=0, le=1000)
    steps: int = Field(default=4, ge=1, le=1000)
    warmup: int = Field(default=3, ge=0, le=1000)


class TrackingConfig(Frozen):
    """Where MLflow lives.

    Attributes:
        uri: a server; none means MLFLOW_TRACKING_URI, else the embedded store.
        experiment: MLflow's experiment; none means MLFLOW_EXPERIMENT_NAME, else "topotune".
    """

    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] | None = None


class StudyConfig(Frozen):
    """Where the study is kept; no uri means TOPOTUNE_STUDY_URI, else a file in the search's folder.

    Attributes:
        uri: ``postgresql://USER@HOST:PORT/DATABASE``, without a password.
    """

    uri: str | None = None

    @field_validator("uri")
    @classmethod
    def _postgresql_without_secrets(cls, uri: str | None) -> str | None:
        if uri is None:
            return None
        parts = urlsplit(uri)
        secret = parts.password is not None or "password=" in parts.query
        if secret or parts.scheme not in ("postgresql", "postgresql+psycopg"):
            # The value is not shown: it may be the password that is wrong here.
            raise ValueError(
                "must be postgresql://USER@HOST:PORT/DATABASE without a password, which would be "
                "copied into the results: put that into TOPOTUNE_STUDY_URI, PGPASSWORD or ~/.pgpass"
            )
        return uri


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


_Objectives = Annotated[tuple[Objective, ...], Field(min_length=1)]


class SearchConfig(Frozen):
    """A search file.

    Attributes:
        name: names the results folder; letters, digits, ``.``, ``_`` and ``-``.
        description: a sentence for the dashboard.
        task, model, train: what is trained and how.
        method: an optimizer (topological_adam, adam, adamw, sgd, nadam or an import path), which
            trains by backpropagation; or tcep, whose parameter ``optimizer`` names one of these.
        fixed: parameters with one value; a conditional parameter that is off falls back to these.
        space: parameters that are searched.
        warm_start: points that are tried first.
        objective: one objective, or a list of them.
        constraints: metric name to bound; a trial that breaks one is never "best".
        seed: seed of the sampler and, hashed with the trial number, of each trial.
    """

    name: str = Field(json_schema_extra={"pattern": f"^{SAFE_NAME.pattern}$"})
    description: str = ""
    task: Annotated[TaskConfig, BeforeValidator(_by_name, json_schema_input_type=str | TaskConfig)]
    model: Annotated[
        ModelConfig, BeforeValidator(_by_name, json_schema_input_type=str | ModelConfig)
    ] = ModelConfig()
    method: str
    train: TrainConfig = TrainConfig()
    fixed: Options = Field(default_factory=dict, json_schema_extra=_PARAM_NAMES)
    space: dict[str, Param] = Field(json_schema_extra={"minProperties": 1, **_PARAM_NAMES})
    warm_start: tuple[dict[str, Scalar | None], ...] = ()
    objective: Annotated[
        _Objectives,
        BeforeValidator(_as_list, json_schema_input_type=Objective | _Objectives),
    ]
    constraints: dict[str, Bound] = Field(default_factory=dict)
    sampler: Annotated[
        SamplerConfig, BeforeValidator(_by_name, json_schema_input_type=SamplerName | SamplerConfig)
    ] = SamplerConfig()
    pruner: Annotated[
        PrunerConfig, BeforeValidator(_by_name, json_schema_input_type=PrunerName | PrunerConfig)
    ] = PrunerConfig()
    budget: Budget
    limits: Limits = Limits()
    resources: Resources = Resources()
    overhead: OverheadConfig = OverheadConfig()
    tracking: TrackingConfig = TrackingConfig()
    study: StudyConfig = StudyConfig()
    keep_checkpoints: int = Field(default=10, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        if not SAFE_NAME.fullmatch(name):
            raise ValueError(
                f"must be 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or "
                f"digit (got {name!r})"
            )
        return name

    @field_validator("space")
    @classmethod
    def _some_space(cls, space: dict[str, Param]) -> dict[str, Param]:
        if not space:
            raise ValueError("at least one parameter must be searched")
        return space

    @model_validator(mode="before")
    @classmethod
    def _default_pruner(cls, data: object) -> object:
        """With several objectives there is no one curve to prune by: by default nothing prunes."""
        if isinstance(data, dict) and "pruner" not in data:
            objective = data.get("objective")
            if isinstance(objective, list | tuple) and len(objective) > 1:
                return {**data, "pruner": "none"}
        return data

    @property
    def directions(self) -> dict[str, str]:
        """Each objective's metric and direction, the first objective first."""
        return {objective.metric: objective.direction for objective in self.objective}

    def with_budget(self, **changes: object) -> SearchConfig:
        """A copy whose budget differs, validated again."""
        data = self.model_dump()
        data["budget"].update(changes)
        return SearchConfig.model_validate(data)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a search file: what :class:`SearchConfig` accepts, in every short form."""
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **SearchConfig.model_json_schema(schema_generator=_AsRead),
        "title": "topotune search file",
    }


_INT_TEXT = r"^\s*[+-]?\d[\d_]*(\.0*)?\s*$"
_FLOAT_TEXT = r"^\s*[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d[\d_]*)?\s*$"
_FLAGS = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
_FLAG_TEXT = "|".join("".join(f"[{c}{c.upper()}]" for c in word) for word in _FLAGS)


class _AsRead(GenerateJsonSchema):
    """Numbers and flags may be quoted, as pydantic reads them.

    A keyword of JSON schema is for one type of value: ``minimum`` passes over texts, ``pattern``
    over numbers.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # the key with a capital letter

    def int_schema(self, schema: Any) -> dict[str, Any]:
        return super().int_schema(schema) | {"type": ["integer", "string"], "pattern": _INT_TEXT}

    def float_schema(self, schema: Any) -> dict[str, Any]:
        found = super().float_schema(schema)
        return found | {"type": ["number", "string"], "pattern": _FLOAT_TEXT}

    def bool_schema(self, schema: Any) -> dict[str, Any]:
        kinds = ["boolean", "string", "integer"]
        return {"type": kinds, "pattern": f"^({_FLAG_TEXT})$", "minimum": 0, "maximum": 1}

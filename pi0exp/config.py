"""The composed configuration as plain frozen types. Nothing past this file sees OmegaConf or YAML."""

from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from importlib import import_module
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pi0exp.errors import UserError
from pi0exp.model.config import ModelConfig
from pi0exp.option import STAGES, Option, StagedOption
from pi0exp.workload import Workload

T = TypeVar("T")
_NO_LIST = "Invalid value assigned: AnyNode is not a ListConfig, list or tuple"


class Device(StrEnum):
    """Where to measure. `auto` is the GPU if this machine has one."""

    auto = "auto"
    gpu = "gpu"
    cpu = "cpu"


@dataclass(frozen=True)
class MeasureConfig:
    """How long and how often (`conf/measure/`). Durations in seconds, the rest are counts of calls.

    observations: on which the actions are held against the truth, a multiple of 4.
    ci_share: go on sampling until half the confidence interval of the median is within this share of it; None: as many
    calls as `samples` says. paced_interval_ms: also measure calls that begin so often; None: no such pass. power_s: of
    calls back to back for power and energy; 0: no such pass. reuse_ceilings: take what this GPU was measured to reach
    within the last week; false: measure it again. reuse_truth: take what actions are held against from a point with the
    same code, machine, weights and inputs; false: compute it again.
    keep_trace: store the profiler's trace with the run.
    explain: say what a measurement would do, and stop.
    """

    device: Device = Device.auto
    observations: int = 8
    inputs: int = 8
    warmup_calls: int = 20
    warmup_s: float = 2.0
    warmup_max_s: float = 60.0
    samples: int = 200
    samples_max_s: float = 60.0
    ci_share: float | None = 0.005
    host_samples: int = 50
    stage_samples: int = 30
    paced_interval_ms: float | None = None
    paced_samples: int = 200
    power_s: float = 5.0
    profile_calls: int = 3
    keep_trace: bool = True
    ceilings_s: float = 2.0
    reuse_ceilings: bool = True
    reuse_truth: bool = True
    timeout_s: float = 3600.0
    explain: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("observations", 8),
            ("inputs", 8),
            ("warmup_calls", 1),
            ("samples", 1),
            ("host_samples", 1),
            ("stage_samples", 1),
            ("paced_samples", 1),
            ("profile_calls", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.observations % 4:
            raise ValueError(f"observations is {self.observations}; it must be a multiple of 4: there are four kinds")
        for name in ("warmup_s", "warmup_max_s", "samples_max_s", "ceilings_s", "timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.power_s != 0 and self.power_s < 5:
            raise ValueError(f"power_s is {self.power_s}; it must be 5 or more, or 0 for none")
        for name in ("ci_share", "paced_interval_ms"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or null for none")


@dataclass(frozen=True)
class TrackConfig:
    """Where results go; see `conf/config.yaml`."""

    uri: str | None = None
    root: str | None = None
    results: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """What `conf/config.yaml` says of a run beside what is measured."""

    name: str = "adhoc"
    resume: bool = True
    track: TrackConfig = field(default_factory=TrackConfig)


class Answer(StrEnum):
    """Which sentence answers the question of a study; see `pi0exp/report/answers.py`."""

    ladder = "ladder"
    fastest = "fastest"
    parity = "parity"
    scaling = "scaling"
    fidelity = "fidelity"
    masks = "masks"
    parts = "parts"
    none = "none"


@dataclass(frozen=True)
class ReportConfig:
    """How the results of a study are shown (`report:` of its yaml); nothing of it is measured.

    label: parameters that name a row; none: the short form of its options. facet: parameters that split tables and
    plots. baseline: first, best or none: the row that others are compared with. order: sweep or latency. metrics:
    columns. plots: by their names in `pi0exp/report/plots.py`. x: the parameter along a curve. series: parameters that
    tell lines apart.
    """

    label: tuple[str, ...] = ()
    facet: tuple[str, ...] = ("model", "workload")
    baseline: str = "first"
    order: str = "sweep"
    metrics: tuple[str, ...] = ("latency_ms/p50", "latency_ms/p90", "roofline/share", "error/rel_l2")
    plots: tuple[str, ...] = ("bars",)
    x: str | None = None
    series: tuple[str, ...] = ()
    answer: Answer = Answer.fastest

    def __post_init__(self) -> None:
        for name in ("label", "facet", "metrics", "plots", "series"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # OmegaConf makes lists of tuples
        for name, allowed in (("baseline", ("first", "best", "none")), ("order", ("sweep", "latency"))):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}")
        if "curve" in self.plots and self.x is None:
            raise ValueError("x is null; a curve needs the parameter that it goes along")


@dataclass(frozen=True)
class Weights:
    """Where the weights come from: `random` ones drawn from `seed`, or a checkpoint, which then wins."""

    weights: str = "random"
    seed: int = 0
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.weights != "random":
            raise ValueError(f"weights is {self.weights!r}; choose random, or set model.checkpoint")


@dataclass(frozen=True)
class Stack:
    """The optimization stack. The fields are applied in the order they stand in."""

    image_masking: Option  # what is computed at all
    fusion: Option  # which weights and operations become one
    precision: Option  # in which numbers; converts the weights that there are then
    gemm: Option  # who multiplies; sees the fused weights
    attention: Option  # who mixes
    compile_mode: Option  # traces all of the above
    graphs: Option  # captures whatever runs in the end

    def options(self) -> list[tuple[str, Option]]:
        """Group and option, in the order of application."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    def parts(self) -> list[tuple[str, Option]]:
        """The same with options of single stages told apart: ("attention.denoise", option)."""
        return [
            (f"{group}.{stage}".rstrip("."), part) for group, option in self.options() for stage, part in option.parts()
        ]


GROUPS = tuple(field.name for field in fields(Stack))


def typed(cls: type[T], values: dict[str, Any], where: str) -> T:
    """`values` as a `cls`: types checked, unknown keys refused, `__post_init__` run. Raises UserError, one line."""
    try:
        result: T = OmegaConf.to_object(OmegaConf.merge(_schema(cls), values))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        key = ".".join(filter(None, [where, str(error.full_key or "")]))
        text = str(error).splitlines()[0].replace(_NO_LIST, "wanted a list, as [true,false]")
        raise UserError(f"{key or 'conf/config.yaml'}: {text}") from error
    except ValueError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{where}.") else f"{where}.{text}") from error
    return result


def _schema(cls: type) -> DictConfig:
    """OmegaConf makes the nodes of frozen dataclasses read-only, nested ones even for a merge; this is undone here."""
    schema: DictConfig = OmegaConf.structured(cls)
    nodes = [schema]
    for node in nodes:
        OmegaConf.set_readonly(node, None)
        # Not node.values(): a field that must be given has none yet.
        nodes += [child for key in node if isinstance(child := node._get_node(key), DictConfig)]
    return schema


def option(group: str, node: Any) -> Option:
    """The option that a group's node describes; single stages may be nodes of their own."""
    if not isinstance(node, dict) or "_target_" not in node:
        raise UserError(f"{group} is {node!r}; it must name an option")
    values = {key: value for key, value in node.items() if key not in ("_target_", *STAGES)}
    cls = _option_class(group, node["_target_"])
    stages = {stage: node[stage] for stage in STAGES if node.get(stage) is not None}
    if stages and not issubclass(cls, StagedOption):
        raise UserError(f"{group}.{next(iter(stages))}: {group} cannot be set for single stages")
    own = typed(cls, values, group)
    return (
        replace(own, **{stage: option(f"{group}.{stage}", inner) for stage, inner in stages.items()}) if stages else own
    )


def _option_class(group: str, target: str) -> type[Option]:
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{group}: _target_ {target!r} cannot be loaded: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Option) and is_dataclass(cls)):
        raise UserError(f"{group}: _target_ {target!r} is not an Option")
    return cls


def stack(plain: dict[str, Any]) -> Stack:
    return Stack(**{group: option(group, plain.get(group)) for group in GROUPS})


def model(plain: dict[str, Any]) -> tuple[ModelConfig, Weights]:
    """The two halves of `conf/model/`: dimensions, and where the weights come from."""
    node, origin = dict(section(plain, "model")), {}
    for name in (one.name for one in fields(Weights)):
        if name in node:
            origin[name] = node.pop(name)
    return typed(ModelConfig, node, "model"), typed(Weights, origin, "model")


def workload(plain: dict[str, Any]) -> Workload:
    return typed(Workload, section(plain, "workload"), "workload")


def measure(plain: dict[str, Any]) -> MeasureConfig:
    return typed(MeasureConfig, section(plain, "measure"), "measure")


def run(plain: dict[str, Any]) -> RunConfig:
    return typed(RunConfig, {one.name: plain[one.name] for one in fields(RunConfig) if one.name in plain}, "")


def report(plain: dict[str, Any]) -> ReportConfig:
    return typed(ReportConfig, plain.get("report") or {}, "report")


def subject_settings(plain: dict[str, Any], cls: type[T]) -> T:
    """The settings of the subject that the configuration names."""
    return typed(
        cls, {name: value for name, value in section(plain, "subject").items() if name != "_target_"}, "subject"
    )


def section(plain: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the configuration that must be there. Raises UserError."""
    if not isinstance(found := plain.get(name), dict):
        raise UserError(f"{name} is {found!r}; it must hold settings")
    return found

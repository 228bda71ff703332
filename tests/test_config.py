"""Every yaml file composes and types, and what cannot be is told in one line that names the key."""

from dataclasses import fields
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from helpers import GROUPS_OF, composed, plain_config
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pi0exp import compose, config, plugins, sweep
from pi0exp.attention.eager import Eager
from pi0exp.attention.sdpa import Backend, Sdpa
from pi0exp.card import asked
from pi0exp.config import GROUPS, Answer, Device, MeasureConfig, ReportConfig, Stack, Weights
from pi0exp.errors import UserError
from pi0exp.model.config import ModelConfig, tiny
from pi0exp.option import STAGES, Option, StagedOption
from pi0exp.point import experiment_of, run_params
from pi0exp.policy_subject import PolicySubject
from pi0exp.title import title, word
from pi0exp.workload import Workload

EXPECTED = {
    "ablation": 22,
    "attention_backends": 8,
    "batch_scaling": 7,
    "breakdown": 5,
    "compile_modes": 9,
    "fidelity": 30,
    "gemm_efficiency": 16,
    "graph_capture": 6,
    "graph_granularity": 10,
    "kernels": 25,
    "ladder": 32,
    "ladder_layers": 5,
    "masking": 9,
    "perf_per_watt": 6,
    "prompt_and_horizon": 10,
    "search": 1,  # of a sweep; it chooses its points while it runs
}
"""Points of each study."""
STUDIES = sorted(file.stem for file in (compose.PACKAGE / "experiments" / "study").glob("*.yaml"))
OPTIONS = [(group, name) for group in GROUPS for name in GROUPS_OF[group]]
ORDER = ("image_masking", "fusion", "precision", "gemm", "attention", "compile_mode", "graphs")
PLOTS = {"waterfall", "kernels", "power", "roofline", "curve", "pareto", "bars"}
REQUIRED = {("compile_mode", "aggressive"): ("options",)}
"""Settings for which only the file of an option has values; its class refuses to be made without them."""


def file_of(group: str, name: str) -> Path:
    return compose.CONF / group / f"{name}.yaml"


def type_all(*overrides: str) -> None:
    """What a run does with its configuration before it starts anything."""
    plain = plain_config(*overrides)
    PolicySubject.from_plain(plain)
    config.measure(plain)


# ---- the files


def test_every_folder_is_a_group():
    assert set(GROUPS_OF) == {*GROUPS, "model", "workload", "measure", "stack", "subject"}
    assert all(GROUPS_OF.values()), "a group without a file"


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS_OF.items() for name in names])
def test_every_file_composes_and_types(group: str, name: str):
    type_all(f"{group}={name}")
    assert plain_config(f"{group}={name}")["names"][group] == name


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_file_of_an_option_lists_its_settings(group: str, name: str):
    """All of them, with the defaults of the class, so that the file is where one looks them up.

    A file that builds on another one lists what it has otherwise.
    """
    values = dict(OmegaConf.load(file_of(group, name)))
    plain = plain_config(f"{group}={name}")
    made = config.option(group, plain[group])
    assert plain["changed"] == {}
    if bases := values.pop("defaults", None):
        base, own = bases
        assert own == "_self_"
        below = plain_config(f"{group}={base}")[group]
        assert plain[group] == below | values
        assert all(value != below[key] for key, value in values.items())
        return
    assert f"{type(made).__module__}.{type(made).__name__}" == values.pop("_target_")
    assert list(values) == [*(f.name for f in fields(made) if f.name not in STAGES), *(STAGES if stages(made) else ())]
    required = {setting: getattr(made, setting) for setting in REQUIRED.get((group, name), ())}
    assert made == type(made)(**required)
    if required:
        with pytest.raises(ValueError, match=r"\w+ is empty"):
            type(made)()


def stages(option: Option) -> bool:
    return isinstance(option, StagedOption)


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_options_of_a_group_agree_on_stages(group: str, name: str):
    """A group may be set for single stages or it may not, whatever its option."""
    assert stages(config.option(group, plain_config(f"{group}={name}")[group])) == (group in compose.STAGED)


@pytest.mark.parametrize(
    ("group", "made"), [("workload", Workload()), ("measure", MeasureConfig())], ids=["workload", "measure"]
)
def test_default_file_is_the_default_of_the_class(group: str, made: object):
    values = OmegaConf.load(file_of(group, "default"))
    assert set(values) == {field.name for field in fields(made)}
    assert config.typed(type(made), dict(values), group) == made


@pytest.mark.parametrize("name", GROUPS_OF["workload"])
def test_workload_is_called_as_its_file_and_complete(name: str):
    values = OmegaConf.load(file_of("workload", name))
    assert values.name == name
    assert set(values) == {field.name for field in fields(Workload)}


@pytest.mark.parametrize(
    ("name", "dimensions"),
    [
        ("pi0", ModelConfig()),
        ("pi05", ModelConfig(pi05=True)),
        ("tiny", tiny()),
        ("tiny_pi05", tiny(pi05=True)),
    ],
)
def test_model_file_has_the_dimensions_of_the_code(name: str, dimensions: ModelConfig):
    assert config.model(plain_config(f"model={name}")) == (dimensions, Weights())


def test_model_file_is_complete():
    values = OmegaConf.load(file_of("model", "pi0"))
    assert set(values) == {f.name for f in fields(ModelConfig)} | {f.name for f in fields(Weights)}


def test_every_model_is_compared():
    assert GROUPS_OF["model"] == ["pi0", "pi05", "tiny", "tiny_pi05"]


# ---- studies


def points(study: str) -> list[list[str]]:
    """The words of every point of a study."""
    return sweep.planned([f"study={study}"])


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_point_of_a_study_types_and_differs(study: str):
    ours, of_hydra = composed(f"study={study}")
    assert ours.name == study, "the MLflow experiment is called as the file"
    assert str(of_hydra.mode) == "RunMode.MULTIRUN"
    expanded = points(study)
    assert len(expanded) == EXPECTED[study]
    stacks = []
    for point in expanded:
        type_all(*point)
        plain = plain_config(*point)
        stacks.append({section: plain[section] for section in (*GROUPS, "subject", "model", "workload", "measure")})
    assert all(one != other for i, one in enumerate(stacks) for other in stacks[:i]), "two points are the same"


@pytest.mark.parametrize("study", STUDIES)
def test_study_says_how_it_is_shown(study: str):
    text = (compose.PACKAGE / "experiments" / "study" / f"{study}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")
    assert "\nreport:\n" in text
    plain = plain_config(f"study={study}")
    shown = config.report(plain)
    assert set(shown.plots) <= PLOTS
    assert "report" not in experiment_of(plain), "it is no part of a point"


def test_report_is_typed_and_has_defaults():
    assert config.report(plain_config()) == config.report({}) == ReportConfig()
    made = config.report({"report": {"label": ["stack"], "answer": "parity"}})
    assert (made.label, made.facet, made.answer) == (("stack",), ("model", "workload"), Answer.parity)


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({"lable": []}, "report.lable: Key 'lable' not in 'ReportConfig'"),
        ({"label": "stack"}, "report.label: "),
        ({"answer": "yes"}, "report.answer: Invalid value 'yes'"),
        ({"baseline": "last"}, "report.baseline is 'last'; choose one of first, best, none"),
        ({"order": "name"}, "report.order is 'name'; choose one of sweep, latency"),
        ({"plots": ["curve"]}, "report.x is null; a curve needs"),
    ],
)
def test_mistake_in_a_report_is_told(given: dict, start: str):
    with pytest.raises(UserError) as caught:
        config.report({"report": given})
    assert str(caught.value).startswith(start)


def test_named_stacks_differ_pairwise():
    # What a search wrote may be one of the others.
    names = [name for name in GROUPS_OF["stack"] if not name.startswith("best_")]
    made = {name: config.stack(plain_config(f"stack={name}")) for name in names}
    assert [(a, b) for a, b in combinations(made, 2) if made[a] == made[b]] == []


def test_ladder_changes_one_group_a_rung():
    numbered = [name for name in GROUPS_OF["stack"] if name[0].isdigit()]
    above = ["9_blocks", "10_persistent", "11_hopper", "12_tuned"]  # the other way on, above h200_best
    rungs = [name for name in numbered if name not in above]
    assert [int(name.partition("_")[0]) for name in rungs] == list(range(len(rungs)))
    climbed = list(dict.fromkeys(word for point in points("ladder") for word in point if word.startswith("stack=")))
    assert climbed == [f"stack={name}" for name in (*rungs, "h200_best", *above, "mi350_best")]
    made = {name: dict(config.stack(plain_config(f"stack={name}")).options()) for name in (*numbered, "h200_best")}
    steps = [*pairwise(rungs[:-1]), ("7_hoists", "9_kernels"), *pairwise(["9_kernels", "h200_best", *above])]
    changed = [[group for group in GROUPS if made[a][group] != made[b][group]] for a, b in steps]
    assert changed[:4] == [["graphs"], ["attention"], ["image_masking"], ["fusion"]]
    assert all(len(groups) == 1 for groups in changed)


# ---- the stack


def test_groups_stand_in_the_order_of_application():
    assert ORDER == GROUPS
    assert tuple(field.name for field in fields(Stack)) == GROUPS
    made = config.stack(plain_config("attention=sdpa", "graphs=manual"))
    assert [group for group, _ in made.options()] == list(ORDER)
    assert dict(made.options())["attention"] == Sdpa()


def test_options_of_single_stages_are_parts_of_the_stack():
    made = config.stack(plain_config("attention=sdpa", "attention.denoise=eager"))
    assert made.attention == Sdpa(denoise=Eager())
    attention = [(name, part) for name, part in made.parts() if name.startswith("attention")]
    assert attention == [("attention", made.attention), ("attention.denoise", Eager())]


def test_an_option_that_no_stage_uses_is_no_part():
    made = config.stack(plain_config("attention=sdpa", *(f"attention.{stage}=eager" for stage in STAGES)))
    assert [name for name, _ in made.parts() if name.startswith("attention")] == [f"attention.{s}" for s in STAGES]


def test_stage_takes_settings():
    made = config.stack(plain_config("attention=sdpa", "attention.denoise={name: sdpa, backend: math}"))
    assert made.attention == Sdpa(backend=Backend.auto, denoise=Sdpa(backend=Backend.math))


def test_stage_takes_the_defaults_of_its_own_option():
    """Not the settings that its group was given."""
    made = config.stack(plain_config("attention=sdpa", "attention.backend=math", "attention.prefill=sdpa"))
    assert made.attention == Sdpa(backend=Backend.math, prefill=Sdpa())


@pytest.mark.parametrize("word", ["attention.denoise=eager", "attention.denoise={name: eager}"])
def test_stage_is_among_names_and_parameters(word: str):
    plain = plain_config("attention=sdpa", word)
    assert (plain["names"]["attention"], plain["names"]["attention.denoise"]) == ("sdpa", "eager")
    params = run_params(plain, PolicySubject.from_plain(plain))
    assert (params["attention"], params["attention.denoise"]) == ("sdpa", "eager")
    assert title(params) == "pi0  default  attention=sdpa attention.denoise=eager"
    assert "attention.denoise" not in plain_config("attention=sdpa")["names"]


CHANGED = [
    (["fusion.rewrites.batch_cameras=true"], {"fusion.rewrites.batch_cameras": "true"}, "+batch_cameras"),
    (["fusion.rewrites.batch_cameras=false"], {}, "plain"),
    (
        ["fusion=projections", "fusion.qkv=false"],
        {"fusion.qkv": "false"},
        "fusion=projections fusion.qkv=false",
    ),
    (["attention=sdpa", "attention.backend=auto"], {}, "attention=sdpa"),
    (["gemm.library=cublaslt"], {"gemm.library": "cublaslt"}, "gemm.library=cublaslt"),
    (["gemm=tunable", "gemm.max_duration_ms=5"], {"gemm.max_duration_ms": "5"}, "gemm=tunable gemm.max_duration_ms=5"),
    (
        ["attention=sdpa", "attention.backend=flash", "attention.denoise={name: sdpa, backend: math}"],
        {"attention.backend": "flash", "attention.denoise.backend": "math"},
        "attention=sdpa attention.denoise=sdpa attention.backend=flash attention.denoise.backend=math",
    ),
    (
        ["compile_mode=aggressive", "~compile_mode.options.max_fusion_size", "compile_mode.region=block"],
        {"compile_mode.region": "block", "compile_mode.options.max_fusion_size": "removed"},
        "compile_mode=aggressive compile_mode.region=block compile_mode.options.max_fusion_size=removed",
    ),
    (["graphs=manual", "graphs.warmup=${measure.inputs}"], {"graphs.warmup": "8"}, "graphs=manual graphs.warmup=8"),
    (["measure.samples=9", "workload.seed=3"], {}, "plain"),
]


@pytest.mark.parametrize(("words", "changed", "named"), CHANGED, ids=[" ".join(words) for words, _, _ in CHANGED])
def test_settings_that_are_not_as_in_the_file_are_parameters(words: list[str], changed: dict[str, str], named: str):
    plain = plain_config(*words)
    assert plain["changed"] == changed
    params = run_params(plain, PolicySubject.from_plain(plain))
    assert {name: params[name] for name in params if name in stack_settings(params)} == changed
    assert title(params) == f"pi0  default  {named}"


def stack_settings(params: dict[str, str]) -> list[str]:
    """The parameters of the groups of the stack that do not name an option."""
    options = (*GROUPS, *(f"{group}.{stage}" for group in compose.STAGED for stage in STAGES))
    return [name for name in params if name.split(".")[0] in GROUPS and name not in options]


def test_settings_of_a_named_stack_are_parameters():
    plain = plain_config("stack=7_hoists", "fusion.rewrites.hoist_time=false")
    params = run_params(plain, PolicySubject.from_plain(plain))
    assert (params["stack"], params["fusion"]) == ("7_hoists", "projections")
    assert params["fusion.rewrites.batch_cameras"] == params["fusion.rewrites.trim_prompt"] == "true"
    assert "fusion.rewrites.hoist_time" not in params
    groups = [name.split(".")[0] for name in params]
    assert list(dict.fromkeys(groups))[: len(GROUPS)] == list(GROUPS), "settings follow their group"
    assert title(params) == "pi0  default  7_hoists"


def test_card_shows_rewrites_by_their_names():
    plain = plain_config("stack=5_cameras", "attention.backend=math")
    (name, text), *_ = asked(run_params(plain, PolicySubject.from_plain(plain)))
    assert name == "stack"
    assert " fusion=projections +batch_cameras " in text
    assert " attention=sdpa attention.backend=math " in text
    assert word("fusion.rewrites.batch_cameras", "false") == "-batch_cameras"


def test_an_option_may_take_a_setting_from_another_group(tmp_path, monkeypatch):
    """What its file takes over is as in the file, whatever the other group says."""
    monkeypatch.setattr(plugins, "installed", lambda: (plugins.Plugin("echo", "1", "echo", tmp_path),))
    (tmp_path / "graphs").mkdir()
    text = "_target_: pi0exp.graphs.manual.Manual\nwarmup: ${workload.seed}\nmax_graphs: 8\n"
    (tmp_path / "graphs" / "echo.yaml").write_text(text)
    plain = compose.from_words(["graphs=echo", "workload.seed=3"])
    assert (plain["graphs"]["warmup"], plain["changed"]) == (3, {})
    plain = compose.from_words(["graphs=echo", "workload.seed=3", "graphs.warmup=4"])
    assert plain["changed"] == {"graphs.warmup": "4"}


def test_what_says_the_same_again_is_no_part_of_a_point():
    plain = plain_config("stack=5_cameras")
    assert plain["changed"]
    assert "changed" not in experiment_of(plain)


# ---- mistakes

ATTENTIONS = ", ".join(GROUPS_OF["attention"])
WRONG = [
    # wrong types and names
    ("workload.batch_size=two", "workload.batch_size: "),
    ("workload.cameras_present=3", "workload.cameras_present: wanted a list, as [true,false]"),
    ("model.vision.width=abc", "model.vision.width: "),
    ("model.vision=null", "model.vision: "),
    ("model.pi05=maybe", "model.pi05: "),
    ("model.seed=x", "model.seed: "),
    ("measure.timeout_s=abc", "measure.timeout_s: "),
    ("measure.device=tpu", "measure.device: "),
    ("graphs=manual graphs.warmup=null", "graphs.warmup: "),
    ("compile_mode=default compile_mode.fullgraph=maybe", "compile_mode.fullgraph: "),
    ("attention=sdpa attention.backend=foo", "attention.backend: "),
    # unknown keys
    ("+workload.foo=1", "workload.foo: "),
    ("+measure.foo=1", "measure.foo: "),
    ("+model.foo=1", "model.foo: "),
    ("+model.vision.foo=3", "model.vision.foo: "),
    ("+graphs.foo=1", "graphs.foo: "),
    ("attention=sdpa +attention.foo=1", "attention.foo: "),
    ("+precision.model=1", "precision.model: "),
    # values
    ("workload.batch_size=0", "workload.batch_size is 0"),
    ("workload.num_steps=-1", "workload.num_steps is -1"),
    ("workload.num_steps=0", "workload.num_steps is 0"),
    ("workload.horizon=0", "workload.horizon is 0"),
    ("workload.prompt_tokens=21", "workload.prompt_tokens is 21"),
    ("workload.cameras_present=[true]", "workload.cameras_present is [True]"),
    ("model.paligemma.depth=4", "model.paligemma.depth is 4 and model.expert.depth 18"),
    ("model.vision.depth=0", "model.vision.depth is 0"),
    ("model.vision.patch_size=0", "model.vision.patch_size is 0"),
    ("model.num_kv_heads=3", "model.num_heads 8 is no multiple of 3"),
    ("model.weights=foo", "model.weights is 'foo'"),
    ("measure.samples=0", "measure.samples is 0"),
    ("measure.inputs=7", "measure.inputs is 7"),
    ("measure.warmup_s=-1", "measure.warmup_s is -1"),
    ("measure.power_s=3", "measure.power_s is 3"),
    ("measure.ci_share=0", "measure.ci_share is 0"),
    ("measure.paced_interval_ms=-1", "measure.paced_interval_ms is -1"),
    ("graphs=manual graphs.warmup=0", "graphs.warmup is 0"),
    ("graphs=manual graphs.max_graphs=0", "graphs.max_graphs is 0"),
    ("compile_mode=default compile_mode.max_structures=0", "compile_mode.max_structures is 0"),
    # classes
    ("graphs._target_=pathlib.Path", "graphs: _target_ 'pathlib.Path' is not an Option"),
    ("graphs._target_=pi0exp.option.Requires", "graphs: _target_ 'pi0exp.option.Requires' is not an Option"),
    ("graphs._target_=nothing", "graphs: _target_ 'nothing' cannot be loaded"),
    ("graphs._target_=no.such.module", "graphs: _target_ 'no.such.module' cannot be loaded"),
    ("graphs._target_=pi0exp.graphs.none.Missing", "graphs: _target_ 'pi0exp.graphs.none.Missing' cannot be loaded"),
    ("~graphs", "graphs is None; it must name an option"),
    ("~attention", "attention is None; it must name an option"),
    ("~workload", "workload is None; it must hold settings"),
    # stages
    ("+graphs.denoise.name=manual", "graphs.denoise: graphs cannot be set for single stages"),
    ("attention.denoise=flsh", f"attention.denoise is 'flsh'; it must name one of {ATTENTIONS}, or"),
    ("attention.denoise=3", f"attention.denoise is 3; it must name one of {ATTENTIONS}, or"),
    ("attention.denoise=[sdpa]", f"attention.denoise is ['sdpa']; it must name one of {ATTENTIONS}, or"),
    ("attention.denoise={backend:math}", "attention.denoise is {'backend': 'math'}; it must name one of"),
    ("gemm.vision=sdpa", f"gemm.vision is 'sdpa'; it must name one of {', '.join(GROUPS_OF['gemm'])}, or"),
    ("attention.denoise={name:sdpa,foo:1}", "attention.denoise.foo: attention=sdpa has no such setting; it has: backe"),
    (
        "attention.denoise={name:eager,foo:1}",
        "attention.denoise.foo: attention=eager has no such setting; it has: none",
    ),
    ("attention.denoise={name:sdpa,backend:bad}", "attention.denoise.backend: "),
    ("attention.denoise={name:sdpa,prefill:eager}", "attention.denoise.prefill: an option of a single stage has no"),
]


@pytest.mark.parametrize(("words", "start"), WRONG, ids=[words for words, _ in WRONG])
def test_mistake_is_told_in_one_line(words: str, start: str):
    with pytest.raises(UserError) as caught:
        type_all(*words.split(" "))
    text = str(caught.value)
    assert text.startswith(start)
    assert "\n" not in text
    assert "object_type" not in text


@pytest.mark.parametrize("words", ["workload.foo=1", "attention=flsh", "study=none_such", "stack=none_such"])
def test_what_hydra_refuses_becomes_one_line(words: str):
    with pytest.raises(HydraException) as caught:
        composed(words)
    text = compose.one_line(caught.value)
    assert "\n" not in text
    assert words.split("=")[0].replace("study=", "study/") in text


def test_unknown_option_lists_the_right_ones():
    with pytest.raises(HydraException) as caught:
        composed("attention=flsh")
    assert "eager, sdpa" in compose.one_line(caught.value)


def test_typed_values_are_frozen():
    made = config.measure(plain_config("measure.device=cpu"))
    assert made.device is Device.cpu
    with pytest.raises(AttributeError):
        made.samples = 3

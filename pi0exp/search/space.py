"""Which stacks a search may propose: the options of each group that this machine can run, and what excludes each other.

A row is a choice for each factor. Factors are read from `conf/` and from installed plugins: the option of a group, for
each stage where stages may differ; the region of a compile mode; each rewrite. No option that is declared APPROXIMATE
takes part, since it computes something else. The precision is that of the command line unless it names several, as
`precision=bf16,fp32`: float32 weighs twice as much, and every trial with it would be lost.
"""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

from pi0exp import build, compose, config
from pi0exp.errors import UserError
from pi0exp.machine import Machine
from pi0exp.option import STAGES, Numerics
from pi0exp.search.narrow import Narrowed

Row = dict[str, str]
"""Factor -> choice: {"graphs": "manual", "attention.denoise": "triton", "fusion.rewrites.hoist_time": "true"}."""
Node = dict[str, Any]

PER_STAGE = ("gemm", "attention")
"""Groups whose stages choose for themselves. Compile modes may too, but each more of them is compiled for minutes."""
REGION = "compile_mode.region"
REGIONS = ("stage", "block")
SWITCHES = ("false", "true")
SLOW = "autotunes whole stages, which takes longer than a trial may: compile_mode.region=block"


@dataclass(frozen=True)
class Space:
    """factors: name -> its choices, the plain one first. left_out: choices that do not take part, and why.

    nodes: group -> option -> its composed node. machine: on which the stacks are to run.
    """

    factors: dict[str, tuple[str, ...]]
    left_out: dict[str, list[str]]
    nodes: dict[str, dict[str, Node]]
    machine: Machine = field(default_factory=Machine)

    @property
    def size(self) -> int:
        """Rows, those that cannot stand among them."""
        return prod(len(choices) for choices in self.factors.values())

    def whole(self, row: Row) -> Row:
        """With the only choice of each factor that has no other."""
        return {name: row.get(name, choices[0]) for name, choices in self.factors.items()}

    @property
    def open(self) -> dict[str, tuple[str, ...]]:
        """The factors that leave a choice."""
        return {name: choices for name, choices in self.factors.items() if len(choices) > 1}

    def words(self, row: Row) -> list[str]:
        """The row as words of the command line. Equal stacks have equal words, and so one key."""
        words = []
        for group in config.GROUPS:
            name, stages = self._option(row, group)
            words += [f"{group}={name}", *(f"{group}.{stage}={other}" for stage, other in stages.items())]
            if group == "compile_mode" and row[REGION] != self.nodes[group][name].get("region", row[REGION]):
                words.append(f"{REGION}={row[REGION]}")
            for section, key in self._switches(group):
                factor, file = f"{group}.{section}.{key}", self.nodes[group][name][section][key]
                words += [f"{factor}={row[factor]}"] if (row[factor] == "true") != file else []
        return words

    def _option(self, row: Row, group: str) -> tuple[str, dict[str, str]]:
        """The option of a group, which most stages have, and the others' stages."""
        if group not in PER_STAGE:
            return row[group], {}
        chosen = {stage: row[f"{group}.{stage}"] for stage in STAGES}
        [(name, _)] = Counter(chosen.values()).most_common(1)
        return name, {stage: other for stage, other in chosen.items() if other != name}

    def _switches(self, group: str) -> list[tuple[str, str]]:
        names = [factor.split(".") for factor in self.factors if factor.count(".") == 2]
        return [(section, key) for of, section, key in names if of == group]

    def stack(self, row: Row) -> config.Stack:
        """The stack that the words compose to, without composing. Raises UserError for settings that cannot be."""
        made = {}
        for group in config.GROUPS:
            name, stages = self._option(row, group)
            node = deepcopy(self.nodes[group][name])
            node |= {stage: self.nodes[group][other] for stage, other in stages.items()}
            if group == "compile_mode" and "region" in node:
                node["region"] = row[REGION]
            for section, key in self._switches(group):
                node[section][key] = row[f"{group}.{section}.{key}"] == "true"
            made[group] = config.option(group, node)
        return config.Stack(**made)

    def excluded(self, row: Row) -> list[str]:
        """Why this stack cannot run, told without a child; none if it may be tried."""
        try:
            reasons = build.unmet(self.stack(row), self.machine)
        except UserError as error:
            return [str(error)]
        return reasons + self.slow(row)

    def slow(self, row: Row) -> list[str]:
        """Why it would take longer than a trial may, though it can run."""
        autotunes = row["compile_mode"].startswith("max_autotune")
        return [f"compile_mode={row['compile_mode']} {SLOW}"] if autotunes and row[REGION] == "stage" else []

    def row_of(self, plain: dict[str, Any]) -> Row | str:
        """The row of a composed stack; or why there is none: what it chooses that is not in the space."""
        names, row = plain["names"], {}
        for factor, choices in self.factors.items():
            group, _, rest = factor.partition(".")
            if group in PER_STAGE:
                row[factor] = names.get(factor, names[group])
            elif not rest:
                row[factor] = names[group]
            else:
                node = plain[group]
                for key in rest.split("."):
                    node = node[key] if key in node else choices[0]
                row[factor] = str(node).lower()
            if row[factor] not in choices:
                reasons = self.left_out.get(f"{group}={row[factor]}")
                return f"{factor}={row[factor]} " + ("; ".join(reasons) if reasons else "is not in the space")
        return row


def space(plain: dict[str, Any], narrowed: Narrowed, machine: Machine) -> Space:
    """What can be chosen on this machine.

    plain: the composed base, whose precision holds. narrowed: what the command line leaves of the factors. Raises
    UserError where it leaves a factor nothing that can run.
    """
    factors: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    nodes: dict[str, dict[str, Node]] = {}
    for group in config.GROUPS:
        nodes[group], ready = _options(group, plain, narrowed, machine, left_out)
        if group in PER_STAGE:
            factors |= {f"{group}.{stage}": ready for stage in STAGES}
        else:
            factors[group] = ready
        if group == "compile_mode":
            factors[REGION] = list(REGIONS)
        factors |= {f"{group}.{switch}": list(SWITCHES) for switch in common_switches(nodes[group], ready)}
    kept = narrowed.of(factors, left_out)
    if not any("region" in nodes["compile_mode"][name] for name in kept["compile_mode"]):
        kept[REGION] = [REGIONS[0]]
    return Space({name: tuple(choices) for name, choices in kept.items()}, left_out, nodes, machine)


def _options(
    group: str, plain: dict[str, Any], narrowed: Narrowed, machine: Machine, left_out: dict[str, list[str]]
) -> tuple[dict[str, Node], list[str]]:
    """The nodes of a group's options, and the names of those that take part; the others go to `left_out`."""
    files, default = compose.files()[group], compose.defaults()[group]
    if group == "precision" and group not in narrowed.choices:
        name = plain["names"][group]
        return {name: plain[group]}, [name]
    nodes, ready = {}, []
    with compose.session():
        for name in sorted(files, key=lambda name: (name != default, name)):
            try:
                nodes[name] = compose.option_node(group, name)
                option = config.option(group, nodes[name])
                reasons = option.unmet(machine)
            except UserError as error:  # its class cannot be imported here
                left_out[f"{group}={name}"] = [str(error)]
                continue
            if option.numerics is Numerics.APPROXIMATE:
                reasons.append("it is APPROXIMATE, and computes other actions")
            if reasons:
                left_out[f"{group}={name}"] = reasons
            else:
                ready.append(name)
    return nodes, ready


def common_switches(nodes: dict[str, Node], ready: Sequence[str]) -> list[str]:
    """section.key of what is true or false and stands in a section of its own, in each of these options."""
    found = [
        [
            f"{section}.{key}"
            for section, node in nodes[name].items()
            if isinstance(node, dict) and "_target_" not in node
            for key, value in node.items()
            if isinstance(value, bool)
        ]
        for name in ready
    ]
    return [switch for switch in found[0] if all(switch in other for other in found)] if found else []

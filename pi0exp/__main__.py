"""python -m pi0exp attention=sdpa graphs=manual

Hydra composes `conf/`, each point is measured in a process of its own, MLflow keeps it. Heavy imports wait until a
point is measured, so that `--help` answers at once.
"""

import sys
import traceback
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pi0exp import advice, collection, compose, interrupts, machine, outcomes
from pi0exp.errors import UserError
from pi0exp.result import CONFIG_ERROR, Outcome


@hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="config")
def job(cfg: DictConfig) -> dict[str, Any]:
    """One point. Whatever is wrong with it is told here, so that a sweep goes on to its next point."""
    node = HydraConfig.get()
    chosen = compose.choices(node)
    given = chosen | compose.overridden(node)
    try:
        plain = compose.plain(cfg, chosen)
        made = point(plain)
    except UserError as error:
        made = {"outcome": "refused", "reasons": [str(error)], "exit_code": refused(error)}
    except Exception as error:
        traceback.print_exc()
        reasons = [f"{type(error).__name__}: {error}"]
        made = {"outcome": Outcome.ERROR.value, "reasons": reasons, "exit_code": Outcome.ERROR.exit_code}
    return {"metrics": {}, **made, "params": given | made.get("params", {})}


def point(plain: dict[str, Any]) -> dict[str, Any]:
    """Measure or explain it."""
    with collection.paused():
        from pi0exp import config  # and with it PyTorch

    if config.measure(plain).explain:
        from pi0exp.explain import explain_point

        return explain_point(plain)
    from pi0exp.point import measure_point

    return measure_point(plain)


def refused(error: Exception) -> int:
    """Tell on one line what a user can mend; the exit code."""
    text = str(error) if isinstance(error, UserError) else advice.on(error, sys.argv[1:])
    print(f"pi0exp: {' '.join(text.split())}", file=sys.stderr)
    return CONFIG_ERROR


def main() -> None:
    full_errors = machine.wants_full_errors()
    machine.let_hydra_raise()
    interrupts.install()
    # Hydra takes overrides from one side of its flags only: `study=ladder -m model=tiny` would be refused.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    try:
        compose.register()
        job()
        code = outcomes.exit_code()
    except UserError as error:
        code = refused(error)  # a plugin
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # all from composing: a job tells its own
        if full_errors:
            raise
        code = refused(error)
    except KeyboardInterrupt as error:
        print(f"pi0exp: interrupted by {interrupts.cause(error)}{outcomes.kept()}", file=sys.stderr)
        code = Outcome.INTERRUPTED.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()

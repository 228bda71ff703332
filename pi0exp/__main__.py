"""python -m pi0exp attention=sdpa graphs=manual

Hydra composes `conf/`, each point is measured in a process of its own, MLflow keeps it. Heavy imports wait until a
point is measured, so that `--help` answers at once.
"""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pi0exp import compose, machine, outcomes
from pi0exp.errors import UserError
from pi0exp.result import CONFIG_ERROR, Outcome


@hydra.main(version_base="1.3", config_path=str(compose.CONF), config_name="config")
def job(cfg: DictConfig) -> dict[str, Any]:
    """One point. What a user can mend is told in one line, so that a sweep goes on to its next point."""
    from pi0exp.point import measure_point

    try:
        return measure_point(compose.plain(cfg, compose.choices(HydraConfig.get())))
    except UserError as error:
        print(f"pi0exp: {error}", file=sys.stderr)
        return {"exit_code": CONFIG_ERROR}


def main() -> None:
    full_errors = machine.wants_full_errors()
    machine.let_hydra_raise()
    compose.register()
    try:
        job()
        code = outcomes.exit_code()
    except (HydraException, OmegaConfBaseException) as error:
        if full_errors:
            raise
        print(f"pi0exp: {compose.one_line(error)}", file=sys.stderr)
        code = CONFIG_ERROR
    except KeyboardInterrupt:
        print("pi0exp: interrupted", file=sys.stderr)
        code = Outcome.INTERRUPTED.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()

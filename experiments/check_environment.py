"""List what `pi0exp` needs and this Python lacks; exit code 2 if anything does. Installs nothing."""

import importlib.util
import sys
from pathlib import Path

# Import name -> what to install. mlflow-skinny with sqlalchemy and alembic is enough to measure; the UI needs mlflow.
NEEDED = {
    "torch": "torch>=2.11",
    "triton": "triton>=3.6",
    "numpy": "numpy",
    "hydra": "hydra-core>=1.3.2",
    "omegaconf": "omegaconf>=2.3",
    "mlflow": "mlflow>=3.7",
    "sqlalchemy": "sqlalchemy",
    "alembic": "alembic",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "PIL": "pillow",
    "packaging": "packaging",
    "pynvml": "nvidia-ml-py",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "psutil": "psutil",
    "scipy": "scipy",
    "jinja2": "jinja2",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "xdist": "pytest-xdist",
}


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036  (this file is what tells)
        print(f"pi0exp needs Python >= 3.11; {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"{sys.executable} lacks: {', '.join(missing)}", file=sys.stderr)
        print("Install them there, or leave PYTHON unset to have .venv made.", file=sys.stderr)
        return 2
    if not (Path(__file__).resolve().parent.parent / "pi0exp" / "kernels" / "__init__.py").exists():
        print("pi0exp/kernels does not lead to kernels/: the checkout lost its symbolic links", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

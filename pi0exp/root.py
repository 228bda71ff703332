"""Where results lie if nobody says otherwise."""

from pathlib import Path


def default_root() -> Path:
    """`mlruns` at the top of the checkout that holds this package; without a checkout, of the working directory."""
    repository = Path(__file__).resolve().parent.parent
    return (repository if (repository / "pyproject.toml").is_file() else Path.cwd()) / "mlruns"

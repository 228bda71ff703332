"""No fusion: every projection, norm and activation by itself."""

from dataclasses import dataclass

from pi0exp.option import Option


@dataclass(frozen=True)
class NoFusion(Option):
    """Leave weights and operations apart."""

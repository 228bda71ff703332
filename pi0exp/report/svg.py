"""Drawing as SVG text: a canvas whose colours are variables of the page, so that one picture serves light and dark.

Every plot is drawn twice, WIDE and NARROW, and the page shows the one that fits: text keeps its size on a phone.
"""

from dataclasses import dataclass, field
from html import escape

WIDE, NARROW = 820.0, 340.0
"""Widths of a picture in pixels."""
FONT, SMALL = 13.0, 12.0
"""Sizes of text in pixels; nothing is smaller."""
_CHARACTER, _BOLD = 0.6, 0.67
"""Mean width of a character, in sizes of the font: of a wide one, since the reader's is not known."""

INK, MUTED, LINE, PAPER = "var(--ink)", "var(--muted)", "var(--line)", "var(--paper)"
COLOURS = tuple(f"var(--c{i})" for i in range(8))
"""Okabe and Ito's, which are told apart with every kind of colour blindness; grey in the place of black."""
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, YELLOW, GREY = COLOURS
ON = ("#fff", "#000", "#fff", "#000", "#000", "#000", "#000", "#fff")
"""What can be read on each of them."""

LIGHT = "--ink:#1b1f24;--muted:#59636e;--line:#d5dae0;--paper:#ffffff;--panel:#f5f7f9;--link:#0057a3;--c7:#6e7781;"
DARK = "--ink:#e8ebef;--muted:#a3adb8;--line:#3a424c;--paper:#14171b;--panel:#1c2127;--link:#7fc0ff;--c7:#6e7781;"
HUES = "--c0:#0072b2;--c1:#d55e00;--c2:#00795a;--c3:#e69f00;--c4:#cc79a7;--c5:#56b4e9;--c6:#f0e442;"
FAMILY = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'
STYLE = f":root{{{HUES}{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
"""The variables, for a page and for a picture that stands alone."""


def width_of(text: str, size: float = FONT, bold: bool = False) -> float:
    """About how wide a text is, in pixels."""
    return len(text) * size * (_BOLD if bold else _CHARACTER)


def fitted(text: str, room: float, size: float = FONT, bold: bool = False) -> str:
    """The text, cut with an ellipsis where it is wider than the room."""
    most = max(int(room / width_of("x", size, bold)), 2)
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


@dataclass
class Canvas:
    """Parts of a picture of `width` pixels; its height is known last."""

    width: float
    height: float = 0.0
    parts: list[str] = field(default_factory=list)

    @property
    def narrow(self) -> bool:
        return self.width < WIDE

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = FONT,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
        turned: bool = False,
    ) -> None:
        """y: of the base line. turned: upwards, for the axis on the left."""
        more = ' font-weight="600"' if bold else ""
        more += f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{more}>'
            f"{escape(text)}</text>"
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = LINE, width: float = 1.0, dash: str = ""
    ) -> None:
        more = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width:g}"{more}/>'
        )

    def path(self, points: list[tuple[float, float]], colour: str, width: float = 1.8, dash: str = "") -> None:
        if len(points) < 2:
            return
        more = f' stroke-dasharray="{dash}"' if dash else ""
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="{width:g}" '
            f'stroke-linejoin="round"{more}/>'
        )

    def bar(
        self, x: float, y: float, width: float, height: float, colour: str, title: str, hollow: bool = False
    ) -> None:
        """title: what the pointer shows. hollow: an outline only, for what does not count."""
        fill = "none" if hollow else colour
        dash = ' stroke-dasharray="4 3"' if hollow else ""
        self.parts.append(
            f'<rect class="mark" x="{x:.1f}" y="{y:.1f}" width="{max(width, 1.0):.1f}" height="{height:.1f}" '
            f'fill="{fill}" stroke="{colour}"{dash}><title>{escape(title)}</title></rect>'
        )

    def break_mark(self, x: float, y: float, height: float) -> None:
        """Two slanted gaps in a bar that goes on beyond the picture."""
        for at in (x - 16, x - 10):
            self.line(at, y + height + 2, at + 6, y - 2, PAPER, 2.5)

    def dot(self, x: float, y: float, colour: str, title: str, hollow: bool = False, radius: float = 5.0) -> None:
        fill = PAPER if hollow else colour
        edge = colour if hollow else PAPER
        self.parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{fill}" stroke="{edge}" '
            f'stroke-width="{2 if hollow else 1}"><title>{escape(title)}</title></circle>'
        )

    def whisker(self, x1: float, x2: float, y: float, upright: bool = False) -> None:
        """An interval from x1 to x2 at y; upright: from y1 to y2 at x, given in the same order."""
        ends = [(x1, y - 4, x1, y + 4), (x2, y - 4, x2, y + 4), (x1, y, x2, y)]
        for a, b, c, d in ends:
            self.line(*((b, a, d, c) if upright else (a, b, c, d)), colour=INK, width=1.4)

    def svg(self, title: str, kind: str = "", alone: bool = False) -> str:
        """The picture. kind: a class of the page's. alone: with the style that the page has otherwise."""
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        named = f' class="{kind}"' if kind else ""
        style = f"<style>{STYLE}</style>" if alone else ""
        ground = f'<rect width="{self.width:g}" height="{self.height:.0f}" fill="{PAPER}"/>' if alone else ""
        family = f" font-family='{FAMILY}'" if alone else ""
        head = (
            f'<svg{space}{named} role="img" width="{self.width:g}" height="{self.height:.0f}" '
            f'viewBox="0 0 {self.width:g} {self.height:.0f}"{family}>'
        )
        return f"{head}<title>{escape(title)}</title>{style}{ground}{''.join(self.parts)}</svg>"

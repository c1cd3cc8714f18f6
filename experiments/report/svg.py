"""From matplotlib figures to small inline SVG whose text stays text and whose colours follow the page's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Shape

Array: TypeAlias = npt.NDArray[np.float64]

# Matplotlib knows no CSS variables: it draws with these stand-ins, and `to_svg` puts the variables in their place.
INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
METHODS, MODALITIES = 10, 8
_VARIABLES = (
    {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"}
    | {f"#0a00{i:02x}": f"--m{i}" for i in range(METHODS)}
    | {f"#0b00{i:02x}": f"--q{i}" for i in range(MODALITIES)}
)


@dataclass(frozen=True)
class Picture:
    """One figure of the page: inline SVG, its title, and the caption that says how to read it."""

    svg: Markup
    title: str
    caption: str


def method_colour(at: int) -> str:
    """Stand-in colour of method slot `at`; slot 0 is the baseline's grey."""
    return f"#0a00{at % METHODS:02x}"


def modality_colour(at: int) -> str:
    """Stand-in colour of modality slot `at`."""
    return f"#0b00{at % MODALITIES:02x}"


def style() -> AbstractContextManager[None]:
    """Matplotlib settings that every figure of the report is drawn under."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "fedmm",
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "text.color": INK,
            "text.parse_math": False,
            "axes.edgecolor": RULE,
            "axes.labelcolor": MUTED,
            "axes.titlecolor": INK,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "axes.unicode_minus": True,
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "grid.color": RULE,
            "grid.linewidth": 0.6,
            "xtick.color": RULE,
            "ytick.color": RULE,
            "xtick.labelcolor": MUTED,
            "ytick.labelcolor": MUTED,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
            "lines.linewidth": 1.8,
            "lines.solid_capstyle": "round",
        }
    )


PAIR, TRIO = 440.0, 340.0
"""Widths of a figure in CSS pixels where two or three stand side by side; they keep the text's size even."""


def panel_width(count: int) -> float:
    """The width of each of `count` figures of a gallery (the page's template lays them out by the same rule)."""
    return PAIR if count in (1, 2, 4) else TRIO


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of the given size in CSS pixels with one pair of axes."""
    figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="constrained")
    return figure, figure.subplots()


def rectangles(axes: Axes, x: Array, y: Array, width: Array, height: Array, colour: str, alpha: float = 1.0) -> None:
    """Draw many rectangles (centres x, y; arrays of one length) as one path, which keeps the page small."""
    if not len(x):
        return
    left, right, bottom, top = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    corners = np.stack([[left, bottom], [right, bottom], [right, top], [left, top], [left, bottom]])
    vertices = corners.transpose(2, 0, 1).reshape(-1, 2)
    codes = np.tile([Shape.MOVETO, Shape.LINETO, Shape.LINETO, Shape.LINETO, Shape.CLOSEPOLY], len(x))
    axes.add_patch(PathPatch(Shape(vertices, codes), facecolor=colour, edgecolor="none", linewidth=0, alpha=alpha))


def to_svg(figure: Figure, *, prefix: str, alt: str) -> Markup:
    """Render a figure as inline SVG.

    Args:
        figure: Drawn under `style()`.
        prefix: Unique on the page; keeps identifiers of different figures apart.
        alt: What the picture shows, for those who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = buffer.getvalue()
    body = text[text.index("<svg") :].strip()
    box = re.search(r'viewBox="([^"]+)"', body)
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", body[body.index(">") + 1 :], flags=re.S)
    # Tags only: between them stands the reader's own text, which must come through as it is.
    body = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group()), body)
    # Matplotlib's identifiers differ from process to process; counted ones make equal pages from equal runs.
    for at, name in enumerate(dict.fromkeys(re.findall(r'<[^>]*\bid="([^"]*)"', body))):
        for form in ('id="{}"', "url(#{})", 'href="#{}"'):
            body = body.replace(form.format(name), form.format(f"{prefix}-{at}"))
    body = re.sub(r"<g>\s*</g>|<defs>\s*</defs>", "", body)
    head = f'<svg viewBox="{box.group(1) if box else ""}" role="img" aria-label="{escape(alt)}">'
    return Markup(head + re.sub(r"\s*\n\s*", "\n", body))


def _tag(tag: str) -> str:
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", " ".join(tag.split()))
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=")
    # The page sets one font for text and pictures.
    tag = re.sub(r"font-family: [^;\"]+; ?", "", tag)
    for colour, variable in _VARIABLES.items():
        tag = tag.replace(colour, f"var({variable})")
    return re.sub(r"(?<![\w#.-])-?\d+\.\d{2,}", lambda m: f"{float(m.group()):.2f}".rstrip("0").rstrip("."), tag)


def every(rounds: Sequence[int], most: int = 120) -> list[int]:
    """At most `most` of the rounds, evenly spread, the last one always among them."""
    if len(rounds) <= most:
        return list(rounds)
    return [rounds[i] for i in sorted({round(j) for j in np.linspace(0, len(rounds) - 1, most)})]


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines["bottom"].set_color(RULE)


def short(text: str, most: int) -> str:
    """The text, cut to `most` characters with an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"

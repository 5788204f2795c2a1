"""Figures without a window system or global state, written as SVG and PNG that depend on their content alone."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#8C564B")
"""Colours that readers of all kinds of colour vision tell apart [1]_, then two more.

.. [1] M. Okabe and K. Ito, "Color Universal Design", 2008.
"""

FLOOR_COLOUR: Final = "#7F7F7F"
FAINT: Final = "#B8B8B8"
DPI: Final = 150

_STYLE: Final[Any] = {
    "font.size": 10,
    # What every matplotlib brings, so that a picture is the same on every machine.
    "font.family": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.06,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    # A dollar sign in the name of a run is a dollar sign.
    "text.parse_math": False,
    # Text stays text: it can be searched, read aloud and edited.
    "svg.fonttype": "none",
    "svg.hashsalt": "medsam-lora",
}
_STYLE_SHEET = re.compile(
    r"\s*<defs>\s*<style[^>]*>\*\{stroke-linejoin: round; stroke-linecap: butt\}</style>\s*</defs>"
)
_GROUP_NAME = re.compile(r'<g id="[^"]*">')


def colour_cycle(n: int) -> list[str]:
    """The first `n` of `COLOURS`, again from the first where there are more."""
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def style() -> Any:
    """The look of all figures, as a context in which they are made and written."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """An empty figure with a title; its parts are laid out so that nothing overlaps.

    Parameters
    ----------
    width_in, height_in : float
        In inches.
    title : str
        Also what a screen reader says of the SVG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure


def settled(figure: Figure) -> Figure:
    """The figure with its parts where they belong; otherwise they would be laid out again for every file.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        Finished; called inside `style`.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def figure_svg(figure: Figure) -> str:
    """A figure as SVG: an ``<svg>`` element to stand alone or inside an HTML page.

    It holds text as text, neither a date nor a style sheet that would reach the page around it, and equal figures
    give equal text.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    """
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    # Names of groups are those of every other figure on the page; shapes that are referred to have names of their own.
    text = _GROUP_NAME.sub("<g>", _STYLE_SHEET.sub("", text))
    title = html.escape(figure.get_suptitle())
    head = f'<svg role="img" aria-label="{title}" style="max-width: 100%; height: auto"'
    head += ' stroke-linejoin="round" stroke-linecap="butt"'
    return text.replace("<svg", head, 1)


def figure_png(figure: Figure) -> bytes:
    """A figure as PNG, at `DPI` pixels per inch; equal figures give equal bytes.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    """
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()

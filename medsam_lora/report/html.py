"""The page itself: the template filled in, with all that it needs inside and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medsam_lora.labels import REGION_COLOURS
from medsam_lora.report.pictures import PREDICTION_COLOUR, REFERENCE_COLOUR
from medsam_lora.report.scores import Number

SCRIPTS: Final = ("volume.js", "viewer.js", "tables.js")

_MINUS = "\N{MINUS SIGN}"
# Before all else: what needs scripts is shown only where they run.
_FIRST_LINE = 'document.documentElement.classList.add("js");\n'


@dataclass(frozen=True)
class Column:
    """A column of scores in the table of cases: its name in ``per_case.csv``, its title, and digits shown."""

    name: str
    title: str
    digits: int
    signed: bool = False


CASE_COLUMNS: Final = (
    Column("dice", "Dice", 3),
    Column("iou", "IoU", 3),
    Column("sensitivity", "Sensitivity", 3),
    Column("precision", "Precision", 3),
    Column("reference_volume_ml", "Reference, ml", 1),
    Column("prediction_volume_ml", "Prediction, ml", 1),
    Column("volume_difference_ml", "Difference, ml", 1, signed=True),
    Column("n_slices", "Slices", 0),
    Column("hd95_mm", "HD95, mm", 1),
    Column("nsd_1mm", "NSD 1 mm", 3),
    Column("nsd_2mm", "NSD 2 mm", 3),
    Column("assd_mm", "ASSD, mm", 1),
    Column("lesionwise_dice", "Lesion-wise Dice", 3),
    Column("lesionwise_hd95_mm", "Lesion-wise HD95, mm", 1),
    Column("lesions_tp", "Lesions found", 0),
    Column("lesions_fp", "Lesions false", 0),
    Column("lesions_fn", "Lesions missed", 0),
)


def number(given: Number, digits: int, signed: bool = False) -> Markup:
    """A number as the page has it: rounded for the eye, in full and with its source for everything else.

    Examples
    --------
    >>> print(number(Number(-0.25, "s0/1/dice", "-0.25"), 1))
    <span class="num" data-value="-0.25" data-source="s0/1/dice">−0.2</span>
    """
    text = f"{given.value:+.{digits}f}" if signed else f"{given.value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")  # no sign where nothing of it is left to see
    return Markup('<span class="num" data-value="{}" data-source="{}">{}</span>').format(
        given.text, given.source, text.replace("-", _MINUS)
    )


def render_page(content: Mapping[str, Any]) -> str:
    """Fill the template.

    Parameters
    ----------
    content : mapping
        The variables of ``report.html.j2``, without ``style``, ``script``, ``policy`` and ``number``.

    Returns
    -------
    str
        HTML that refers to no other file.
    """
    environment = Environment(
        loader=PackageLoader("medsam_lora.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # The order of regions and runs says what lies over what.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    environment.globals |= {"number": number, "floor_means": content["floor_means"]}
    style, script = _read("report.css") + _swatches(), _FIRST_LINE + "".join(_read(name) for name in SCRIPTS)
    # Hashes instead of 'unsafe-inline': a case id that got past the escaping could still run nothing.
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("report.html.j2").render(
        content, style=Markup(style), script=Markup(script), policy=policy
    )


def css_colour(colour: Sequence[float]) -> str:
    """A colour of [0, 1] as CSS writes it.

    Examples
    --------
    >>> css_colour((1.0, 0.5, 0.0))
    '#ff8000'
    """
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _swatches() -> str:
    shown = {**REGION_COLOURS, "reference": _unit(REFERENCE_COLOUR), "prediction": _unit(PREDICTION_COLOUR)}
    return "".join(f".swatch-{name} {{ background: {css_colour(colour)}; }}\n" for name, colour in shown.items())


def _unit(colour: Sequence[int]) -> tuple[float, ...]:
    return tuple(part / 255 for part in colour)


def _read(name: str) -> str:
    return files("medsam_lora.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

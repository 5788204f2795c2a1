"""What scores, regions and methods are called where a reader meets them, and which way a score is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Score:
    """A column of ``per_case.csv`` that can be compared.

    Parameters
    ----------
    column : str
    title : str
        For axes and headings, without the unit.
    higher_is_better : bool
    unit : str
        Empty for shares.
    of_challenge : bool
        Whether the column is there only where a challenge was named, which then is part of its definition.
    absolute : bool
        Whether its absolute value is compared, as 0 is best.
    short : str
        For sentences, behind the number; the title where empty.
    """

    column: str
    title: str
    higher_is_better: bool = True
    unit: str = ""
    of_challenge: bool = False
    absolute: bool = False
    short: str = ""

    @property
    def better(self) -> str:
        """``higher`` or ``lower``."""
        return "higher" if self.higher_is_better else "lower"

    @property
    def axis(self) -> str:
        """Title, unit and direction, for an axis.

        Examples
        --------
        >>> SCORES["hd95_mm"].axis
        'Hausdorff distance, 95 % (mm, lower is better)'
        """
        return f"{self.title} ({self.unit}{', ' if self.unit else ''}{self.better} is better)"

    def amount(self, value: float) -> str:
        """A value with its unit and the name of the score, for a sentence.

        Examples
        --------
        >>> SCORES["dice"].amount(0.0642), SCORES["hd95_mm"].amount(2.5)
        ('0.064 Dice', '2.50 mm HD95')
        """
        return " ".join(part for part in (self.number(value), self.unit, self.short or self.title) if part)

    def number(self, value: float) -> str:
        """A value with the decimals that mean something: three of a share, two of a length, a volume or a count.

        Examples
        --------
        >>> SCORES["dice"].number(-0.0642), SCORES["hd95_mm"].number(-0.0001)
        ('-0.064', '0.00')
        """
        text = f"{value:.2f}" if self.unit else f"{value:.3f}"
        return text.removeprefix("-") if not float(text) else text


def _scores(*scores: Score) -> dict[str, Score]:
    return {score.column: score for score in scores}


SCORES: Final[Mapping[str, Score]] = _scores(
    Score("dice", "Dice"),
    Score("iou", "intersection over union"),
    Score("sensitivity", "sensitivity"),
    Score("precision", "precision"),
    Score("volume_difference_ml", "absolute difference of volume", False, "ml", absolute=True, short="of volume"),
    Score("hd95_mm", "Hausdorff distance, 95 %", False, "mm", True, short="HD95"),
    Score("nsd_1mm", "surface within 1 mm", True, "", True),
    Score("nsd_2mm", "surface within 2 mm", True, "", True),
    Score("assd_mm", "mean surface distance", False, "mm", True),
    Score("specificity", "specificity", True, "", True),
    Score("lesionwise_dice", "lesion-wise Dice", True, "", True),
    Score("lesionwise_hd95_mm", "lesion-wise Hausdorff distance, 95 %", False, "mm", True, short="lesion-wise HD95"),
    Score("lesions_tp", "lesions found", True, "lesions", True, short="found"),
    Score("lesions_fp", "false lesions", False, "lesions", True, short="found in vain"),
    Score("lesions_fn", "lesions missed", False, "lesions", True, short="missed"),
    Score("legacy_dice", "Dice as the challenge defines it", True, "", True),
    Score("legacy_hd95_mm", "Hausdorff distance as the challenge defines it", False, "mm", True, short="legacy HD95"),
)
"""Every score of ``per_case.csv`` that has a better direction, by its column."""

REFERENCE_VOLUME: Final = Score("reference_volume_ml", "volume of the reference", unit="ml")
PREDICTION_VOLUME: Final = Score("prediction_volume_ml", "volume of the prediction", unit="ml")

REGION_NAMES: Final[Mapping[str, str]] = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}

_METHOD_NAMES: Final[Mapping[str, str]] = {
    "filled_box": "filled box (floor)",
    "zero_shot": "zero-shot",
    "lora": "LoRA",
    "decoder_only": "decoder only",
    "full": "full fine-tuning",
}


def method_name(label: str) -> str:
    """A label as a reader knows the method; labels that a user chose stay as they are.

    Examples
    --------
    >>> method_name("zero_shot"), method_name("lora_r8")
    ('zero-shot', 'lora_r8')
    """
    return _METHOD_NAMES.get(label, label)


def region_name(region: str) -> str:
    """A region in words with its short name.

    Examples
    --------
    >>> region_name("WT")
    'whole tumour (WT)'
    """
    return f"{REGION_NAMES[region]} ({region})" if region in REGION_NAMES else region

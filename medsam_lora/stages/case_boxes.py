"""The boxes that a case is predicted with: of a table, of its reference, or its whole slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medsam_lora.errors import ConfigError, DataError
from medsam_lora.peft import METHODS, method_spec
from medsam_lora.prompts.sources import inside, reference_boxes, whole_slices
from medsam_lora.records import CaseVolumes, SliceBox
from medsam_lora.transforms.stages import brain_of


@dataclass(frozen=True)
class BoxOptions:
    """How boxes are made where none are given.

    Parameters
    ----------
    kind : str
        Of the reference's boxes: a key of `prompts.BOX_KINDS`.
    min_voxels : int
        Of the reference's boxes.
    prompted : bool
        False: the method has a prompt of its own, and every slice that shows brain is predicted.
    """

    kind: str = "union"
    min_voxels: int = 1
    prompted: bool = True


def check_prompts(prompts: str, method: str) -> None:
    """Refuse to do without prompts where the method goes by them.

    Parameters
    ----------
    prompts : str
        ``predict.prompts``.
    method : str
        A key of `peft.METHODS`, or several joined by ``+``.

    Raises
    ------
    ConfigError
        Naming the methods that need none.
    """
    spec = method_spec(method)
    if prompts == "none" and spec.prompted:
        able = ", ".join(name for name, spec in METHODS.items() if not spec.prompted)
        raise ConfigError(
            f"predict.prompts is none, and {method} goes by prompts",
            remedy=f"Set predict.prompts=boxes, or train a method that needs none ({able}, alone or with others by +).",
        )


def boxes_of_case(case: CaseVolumes, given: Sequence[SliceBox] | None, options: BoxOptions) -> list[SliceBox]:
    """The boxes of a case, in its native frame.

    Parameters
    ----------
    case : CaseVolumes
    given : sequence of SliceBox, optional
        The lines of a table.
    options : BoxOptions

    Raises
    ------
    DataError
        Where a table has none for this case or some outside its volume, or there is no reference to take them from.
    """
    if not options.prompted:
        return whole_slices(brain_of(case.image))
    if given is not None:
        if not given:
            raise DataError(
                "the box table has no line for this case",
                case_id=case.record.case_id,
                remedy="Add its boxes, or take the case out of the manifest.",
            )
        outside = [b for b in given if not inside(b, case.geometry)]
        if outside:
            b = outside[0]
            raise DataError(
                f"{len(outside)} boxes leave the volume of shape {case.geometry.shape}, the first is "
                f"k={b.k} ({b.i0:g}, {b.j0:g}, {b.i1:g}, {b.j1:g})",
                case_id=case.record.case_id,
                remedy="Give voxel indices of this very file (array axes 0, 1, 2), half-open.",
            )
        return list(given)
    if case.label_map is None:
        raise DataError(
            "the case has no reference to take box prompts from",
            case_id=case.record.case_id,
            remedy="Give boxes with --boxes FILE.csv (case_id,k,i0,j0,i1,j1).",
        )
    return reference_boxes(case.label_map, case.geometry, "WT", options.kind, options.min_voxels)

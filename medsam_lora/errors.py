"""The one exception hierarchy of the package.

Every error a user can cause names the case, the file and the remedy; the command line prints it on one line
(the traceback only with ``--debug``) and maps it to exit code 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class MedsamLoraError(Exception):
    """An error that a user can act on.

    Parameters
    ----------
    message : str
        What is wrong, in one sentence without the file name.
    case_id : str, optional
        The case concerned.
    path : str or Path, optional
        The file concerned.
    remedy : str, optional
        What to do about it, as an imperative sentence.
    code : str, optional
        The finding code (`docs/findings.md`) where `verify` lists such faults.

    Examples
    --------
    >>> str(MedsamLoraError("the file is empty", case_id="a-1", path="t1n.nii.gz", remedy="Copy it again."))
    'case a-1: t1n.nii.gz: the file is empty. Remedy: Copy it again.'
    """

    def __init__(
        self,
        message: str,
        *,
        case_id: str | None = None,
        path: str | Path | None = None,
        remedy: str | None = None,
        code: str | None = None,
    ) -> None:
        self.message = message.rstrip(".")
        self.case_id = case_id
        self.path = None if path is None else Path(path)
        self.remedy = remedy
        self.code = code
        super().__init__(self.message)

    def __str__(self) -> str:
        parts = [] if self.case_id is None else [f"case {self.case_id}"]
        if self.path is not None:
            parts.append(str(self.path))
        text = ": ".join([*parts, self.message])
        stop = "" if text.endswith("?") else "."
        return text if self.remedy is None else f"{text}{stop} Remedy: {self.remedy}"

    def __reduce__(self) -> tuple:
        # Keyword-only arguments do not survive the default pickling that worker processes use.
        return _rebuild, (type(self), self.message, self.case_id, self.path, self.remedy, self.code)


def _rebuild(
    kind: type[MedsamLoraError],
    message: str,
    case_id: str | None,
    path: Path | None,
    remedy: str | None,
    code: str | None,
) -> MedsamLoraError:
    return kind(message, case_id=case_id, path=path, remedy=remedy, code=code)


class ConfigError(MedsamLoraError):
    """An unknown or ill-typed setting, or settings that contradict each other."""


class ManifestError(MedsamLoraError):
    """A manifest, split or box table that cannot be used."""


class DataError(MedsamLoraError):
    """A case or one of its files that cannot be used."""


class PreparedError(MedsamLoraError):
    """A prepared store that is missing, incomplete, changed, or made for something else."""


class WeightsError(MedsamLoraError):
    """Base weights that are missing, corrupt, or of another model."""


class AdapterError(MedsamLoraError):
    """An adapter file that is corrupt or does not fit the model it is loaded into."""


class TrainingError(MedsamLoraError):
    """Training that cannot start, resume, or be trusted."""


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like `name`, for a "did you mean", or None where none is near.

    Examples
    --------
    >>> nearest("rnak", ["rank", "alpha"]), nearest("zzz", ["rank", "alpha"])
    ('rank', None)
    """
    import difflib

    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return found[0] if found else None

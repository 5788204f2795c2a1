"""A study: optuna proposes points, each is an ordinary run, and the Dice of the validation cases says how good it is.

The test cases are never looked at: settings that were chosen on them could not be judged on them any more.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import yaml

from medsam_lora.errors import ConfigError
from medsam_lora.io.files import sha256_of, write_bytes_atomically
from medsam_lora.io.tables import read_table
from medsam_lora.stages.pipeline import Method
from medsam_lora.stages.point_names import text_of
from medsam_lora.stages.scoring import FLOOR
from medsam_lora.stages.sweep_file import Point, RangeSection, Sweep, point_of, swept_methods
from medsam_lora.stages.sweep_points import TRACEBACK_FILE, run_point, write_sweep_table
from medsam_lora.stages.sweep_table import DONE, FAILED, INCOMPLETE
from medsam_lora.stages.workplace import Workplace, timed

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

STUDY_FILE: Final = "study.db"
BEST_FILE: Final = "best.yaml"
_IDENTITY: Final = "identity"
# As many digits as a name shows: the run is of the very value that its folder names.
_DIGITS: Final = 3
_WHY: Final = {
    FAILED: f"failed, see its {TRACEBACK_FILE}",
    INCOMPLETE: "is incomplete: some of its cases failed, see failures.csv",
}


def check_installed() -> None:
    """Refuse where optuna is not installed.

    Raises
    ------
    ConfigError
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "a study needs optuna", remedy="pip install 'medsam-lora[sweep]', or give a grid instead."
        ) from error


def run_study(place: Workplace, sweep: Sweep) -> list[Point]:
    """Go on with a study, or begin it, until it has its number of trials with a score.

    A trial that was stopped is taken up again. One that failed, or some of whose cases did, does not count; a call
    ends when as many have failed in it as the study is to have.

    Parameters
    ----------
    place : Workplace
        Its folder receives ``study.db`` (optuna's, SQLite) and ``best.yaml``, a pipeline that trains the best point
        again and scores it on the test cases.
    sweep : Sweep

    Returns
    -------
    list of Point
        Methods that are not tuned, then the points in the order of their first trials.

    Raises
    ------
    ConfigError
        Where ``study.db`` is of other settings.
    """
    assert sweep.split == "val"
    (base,) = swept_methods(sweep)
    options = sweep.settings.study
    assert options is not None
    course = _Course(place, sweep, base, _open(place, sweep, base))
    others = [Point(m, {}) for m in place.pipeline.methods if m not in swept_methods(sweep)]
    for point in others:
        run_point(place, point)
    course.name_failed()
    failed: list[str] = []
    # Failures do not count, so that they have to be bounded: what always fails would go on for ever.
    while course.scored() < options.trials and len(failed) < options.trials:
        trial = course.next()
        point = course.point(trial.params)
        logger.info("trial %d (%d of %d have a score): %s", trial.number, course.scored(), options.trials, point.label)
        status = FAILED
        if point.label not in failed:
            with timed(place, point.label):
                status = run_point(place, point)
        # A score in which failed cases count 0 says nothing of the settings.
        course.tell(trial.number, validation_dice(place.out, point.label) if status == DONE else None)
        if status != DONE:
            failed.append(point.label)
            logger.warning("trial %d does not count: %s %s", trial.number, point.label, _WHY[status])
        write_sweep_table(place, sweep, [*others, *course.points()])
    if course.scored() < options.trials:
        logger.error(
            "the study ends with %d of %d trials: %d failed in this call; mend what made them fail, and give the same "
            "command again",
            course.scored(),
            options.trials,
            len(failed),
        )
    course.write_best()
    return [*others, *course.points()]


def validation_dice(out: Path, label: str) -> float:
    """What a study maximises: the mean Dice over the cases that were scored and, of several, over the regions."""
    rows = read_table(out / "runs" / label / "per_case.csv", ("method", "region", "dice"))
    mine = [row for row in rows if row["method"] != FLOOR]
    regions = dict.fromkeys(row["region"] for row in mine)
    return float(np.mean([np.mean([float(row["dice"]) for row in mine if row["region"] == r]) for r in regions]))


@dataclass
class _Course:
    """A study on its way."""

    place: Workplace
    sweep: Sweep
    base: Method
    study: Study

    def scored(self) -> int:
        """Trials that count."""
        return sum(trial.value is not None for trial in self.study.trials)

    def name_failed(self) -> None:
        """Say which trials of earlier calls do not count."""
        ended = [t for t in self.study.trials if t.state.is_finished() and t.value is None and self._is_whole(t)]
        if ended:
            told = ", ".join(f"{trial.number} ({self.point(trial.params).label})" for trial in ended)
            logger.warning("trials that failed before do not count: %s", told)

    def _is_whole(self, trial: FrozenTrial) -> bool:
        return set(trial.params) == set(self.sweep.keys)

    def next(self) -> FrozenTrial:
        """The trial that was stopped, else a new one."""
        for trial in self.study.trials:
            if trial.state.is_finished():
                continue
            if self._is_whole(trial):
                return trial
            self.tell(trial.number, None)  # stopped before it had all its values
        options = self.sweep.settings.study
        assert options is not None
        # A sampler for each trial, by its number: a study that was stopped goes on as if it had not been.
        self.study.sampler = _sampler(options.sampler, options.seed, len(self.study.trials))
        number = self.study.ask(_distributions(self.sweep)).number
        return self.study.trials[number]

    def point(self, params: Mapping[str, Any]) -> Point:
        names, values = {}, {}
        for key in self.sweep.keys:
            if key in self.sweep.choices:
                names[key] = params[key]
                values[key] = self.sweep.choices[key][params[key]]
            else:
                values[key] = _rounded(params[key], self.sweep.ranges[key])
                names[key] = text_of(values[key])
        return point_of(self.sweep, self.base, values, names)

    def points(self) -> list[Point]:
        """The points of the trials, each once."""
        whole = [trial for trial in self.study.trials if self._is_whole(trial)]
        return list({point.label: point for point in (self.point(trial.params) for trial in whole)}.values())

    def tell(self, number: int, dice: float | None) -> None:
        from optuna.trial import TrialState

        if dice is None:
            self.study.tell(number, state=TrialState.FAIL)
        else:
            self.study.tell(number, dice)

    def write_best(self) -> None:
        """Say which point was best, and write a pipeline that judges it on cases that chose nothing."""
        if not any(trial.value is not None for trial in self.study.trials):
            logger.warning("no trial has a score: there is no best point")
            return
        best = self.study.best_trial
        point = self.point(best.params)
        path = self.place.out / BEST_FILE
        write_bytes_atomically(path, _pipeline_of(self.sweep, point).encode())
        print(f"best on the validation cases: {point.label}, Dice {best.value:.4f} (too high, as it was chosen by it)")
        print(f"on the test cases, once: medsam-lora run {path} --out {self.place.out / 'best'}")


def _rounded(number: int | float, numbers: RangeSection) -> int | float:
    """A number with as many digits as its name shows, still within its range."""
    if isinstance(number, int):
        return number
    return min(max(float(f"{number:.{_DIGITS}g}"), float(numbers.low)), float(numbers.high))


def _pipeline_of(sweep: Sweep, point: Point) -> str:
    """A pipeline file with the point and the methods that were not tuned, all sections in full."""
    settings = sweep.pipeline.settings.model_dump(
        mode="json", exclude={"methods", "stages", "name", "description", "pretrain"}
    )
    tuned = swept_methods(sweep)
    entries: list[dict[str, Any]] = []
    for method in [*(m for m in sweep.pipeline.methods if m not in tuned), point.method]:
        sections = method.config.model_dump(mode="json")
        options = sections.pop("method")
        label = method.label if method is not point.method else "best"
        entries.append({**options, "label": label, **sections})
    data = {
        "name": f"{sweep.pipeline.settings.name}-best",
        "description": f"{point.label}, the best of a study by validation Dice, to be scored on the test cases.",
        **{key: value for key, value in settings.items() if value is not None},
        "evaluate": sweep.pipeline.base.evaluate.model_dump(mode="json"),
        "data": sweep.pipeline.base.data.model_dump(mode="json"),
        "methods": entries,
    }
    return yaml.safe_dump(data, sort_keys=False)


def _open(place: Workplace, sweep: Sweep, base: Method) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = place.out / STUDY_FILE
    study = optuna.create_study(
        storage=f"sqlite:///{path}",
        study_name=sweep.pipeline.settings.name,
        direction="maximize",
        load_if_exists=True,
    )
    identity = _identity(place, sweep, base)
    known = study.user_attrs.get(_IDENTITY)
    if known is None:
        study.set_user_attr(_IDENTITY, identity)
    elif known != identity:
        raise ConfigError(
            "the study was begun with other keys, settings, cases or seed",
            path=path,
            remedy="Go on with those (study.trials may differ), or give another --out.",
        )
    return study


def _identity(place: Workplace, sweep: Sweep, base: Method) -> str:
    study = sweep.settings.study
    assert study is not None
    facts = {
        "study": study.model_dump(mode="json", exclude={"trials"}),
        "config": base.config.model_dump(mode="json", exclude={"train": {"cache_gib", "processes"}}),
        "cases": sha256_of(place.manifest),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _distributions(sweep: Sweep) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for key in sweep.keys:
        if key in sweep.choices:
            found[key] = CategoricalDistribution(list(sweep.choices[key]))
            continue
        numbers = sweep.ranges[key]
        if isinstance(numbers.low, int) and isinstance(numbers.high, int):
            found[key] = IntDistribution(numbers.low, numbers.high, log=numbers.log)
        else:
            found[key] = FloatDistribution(float(numbers.low), float(numbers.high), log=numbers.log)
    return found


def _sampler(name: str, seed: int, number: int) -> Any:
    from optuna.samplers import RandomSampler, TPESampler

    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    return TPESampler(seed=own) if name == "tpe" else RandomSampler(seed=own)

"""Selection by Dice: a worse or equal epoch never replaces the best."""

from __future__ import annotations

from medsam_lora.training.early_stopping import EarlyStopping


def test_the_best_is_never_overwritten_by_a_worse_or_equal_value() -> None:
    stopping = EarlyStopping(patience=None)
    kept = [e for e, d in enumerate([0.4, 0.7, 0.7, 0.5, 0.71, 0.2]) if stopping.update(e, d)]
    assert kept == [0, 1, 4]
    assert (stopping.best_epoch, stopping.best) == (4, 0.71)


def test_nan_is_never_the_best() -> None:
    stopping = EarlyStopping(patience=None)
    assert stopping.update(0, 0.3)
    assert not stopping.update(1, float("nan"))
    assert stopping.best == 0.3


def test_patience_counts_epochs_since_the_best() -> None:
    stopping = EarlyStopping(patience=3)
    for epoch, dice in enumerate([0.5, 0.6, 0.55, 0.58]):
        stopping.update(epoch, dice)
    assert not stopping.exhausted(3)
    assert stopping.exhausted(4)
    assert not EarlyStopping(patience=None, best=0.5).exhausted(1000)

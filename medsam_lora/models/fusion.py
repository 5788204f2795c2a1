"""One mask from the masks of several modalities.

Every fusion takes logits of shape (B, M, R, h, w), one channel M per modality given, and returns (B, R, h, w) logits.
`present` names which of the run's modalities the M channels are, so that any subset works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsam_lora.config import nearest
from medsam_lora.errors import ConfigError


class Fusion(nn.Module):
    """What all fusions share: they know the run's modalities and check what they are given.

    Parameters
    ----------
    modalities : sequence of str
        Of the run, in channel order.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)

    def forward(self, logits: Tensor, present: Sequence[int] | None = None) -> Tensor:
        """Fuse.

        Parameters
        ----------
        logits : Tensor of float, shape (B, M, R, h, w)
        present : sequence of M int, optional
            Index within the run's modalities of each channel; None where all of them are given, in order.

        Returns
        -------
        Tensor of float, shape (B, R, h, w)

        Raises
        ------
        ValueError
            Where the channels are not those of `present`, or `present` names one twice or outside the run.
        """
        indices = list(range(len(self.modalities))) if present is None else [int(i) for i in present]
        known = range(len(self.modalities))
        if not indices or len(set(indices)) != len(indices) or any(i not in known for i in indices):
            raise ValueError(f"present={indices} must name some of {len(self.modalities)} modalities, each once")
        if logits.ndim != 5 or logits.shape[1] != len(indices):
            raise ValueError(f"logits of shape {tuple(logits.shape)} do not hold {len(indices)} modalities on axis 1")
        return self.fuse(logits, indices)

    def fuse(self, logits: Tensor, present: list[int]) -> Tensor:
        """What the fusion does with checked arguments; see `forward`."""
        return logits.mean(dim=1)


class MeanLogit(Fusion):
    """The mean of the logits: the geometric mean of the odds. A modality without doubt outvotes hesitant ones."""


class MeanProbability(Fusion):
    """The logit of the mean probability. A modality without doubt counts as one voice, however large its logit."""

    def fuse(self, logits: Tensor, present: list[int]) -> Tensor:
        """``logit(mean(sigmoid(x)))``."""
        return _logit_of_mean_probability(logits)


class Max(Fusion):
    """The largest logit: tumour is where any modality sees it (the union of the masks)."""

    def fuse(self, logits: Tensor, present: list[int]) -> Tensor:
        """``max(x)``."""
        return logits.amax(dim=1)


class Vote(Fusion):
    """The majority of the modalities at evaluation; at training its relaxation, the mean probability.

    The mask (logit > 0) is that of the hard majority vote; a tie goes to the sign of the mean logit. The logit
    returned is the median, which has the majority's sign by definition and, unlike a vote of plus or minus one,
    keeps the borders smooth when it is resized and stays a majority vote at any other threshold.
    The median follows one modality at each pixel, so that the others would learn nothing there; hence the relaxation.
    """

    def fuse(self, logits: Tensor, present: list[int]) -> Tensor:
        """Median logit, or logit of the mean probability in training mode."""
        if self.training:
            return _logit_of_mean_probability(logits)
        ordered = logits.sort(dim=1).values
        n_modalities = logits.shape[1]
        lower, upper = ordered[:, (n_modalities - 1) // 2], ordered[:, n_modalities // 2]
        tie = (lower <= 0) & (upper > 0)
        by_mean = torch.where(logits.mean(dim=1) > 0, upper, lower)
        return torch.where(tie, by_mean, (lower + upper) / 2)


class Learned(Fusion):
    """A weighted mean of the logits with one learned weight per modality, the same for every region and pixel.

    The weights are the softmax of the parameters over the modalities that are present, so that they are positive and
    sum to one for any subset. Parameters start at zero: as `MeanLogit`. They belong to the adapter and are saved in it.
    With a single modality there is nothing to learn.
    """

    def __init__(self, modalities: Sequence[str]) -> None:
        super().__init__(modalities)
        self.modality_weights = nn.Parameter(torch.zeros(len(self.modalities)))

    def fuse(self, logits: Tensor, present: list[int]) -> Tensor:
        """``sum(softmax(w)[present] * x)``."""
        weights = self.modality_weights[present].softmax(dim=0).to(logits.dtype)
        return torch.einsum("m,bmrhw->brhw", weights, logits)


FUSIONS: Final[Mapping[str, type[Fusion]]] = {
    "mean_logit": MeanLogit,
    "mean_probability": MeanProbability,
    "max": Max,
    "vote": Vote,
    "learned": Learned,
}
"""The fusions by name."""


def build_fusion(name: str, modalities: Sequence[str]) -> Fusion:
    """A fusion for the modalities of a run.

    Raises
    ------
    ConfigError
        Where no fusion has this name (the nearest one is named), or there is no modality.

    Examples
    --------
    >>> fusion = build_fusion("max", ["t1c", "t2f"])
    >>> fusion(torch.tensor([-1.0, 2.0]).reshape(1, 2, 1, 1, 1)).item()
    2.0
    """
    if name not in FUSIONS:
        guess = nearest(name, list(FUSIONS))
        hint = f"; did you mean {guess}?" if guess else ""
        raise ConfigError(f"unknown fusion {name!r}{hint}", remedy=f"Choose one of {', '.join(FUSIONS)}.")
    if not modalities:
        raise ConfigError("no modality to fuse", remedy="Name one or more in data.modalities.")
    return FUSIONS[name](modalities)


def _logit_of_mean_probability(logits: Tensor) -> Tensor:
    # log(p / (1 - p)) with p and 1 - p as sums of sigmoids in the log domain: no probability is rounded to 0 or 1,
    # which would make the logit infinite from about 17 on in float32. The two 1 / M cancel.
    positive = functional.logsigmoid(logits).logsumexp(dim=1)
    negative = functional.logsigmoid(-logits).logsumexp(dim=1)
    return positive - negative

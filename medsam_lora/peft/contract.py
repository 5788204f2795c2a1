"""What every method promises: the `Adaptation` that `attach` returns.

A method is a list of `Edit` (see `edits`), and an `Adaptation` does with them all that a user asks of a method: freeze
the rest, report, save, load, merge, disable, detach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsam_lora.config import MethodConfig
from medsam_lora.errors import AdapterError
from medsam_lora.peft.edits import Edit

_MARK = "_medsam_lora_adaptation"


@dataclass(frozen=True)
class TrainableTensor:
    """A declared tensor: its dotted name within the model, shape, and learning-rate group."""

    name: str
    shape: tuple[int, ...]
    group: str

    @property
    def count(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class GroupRule:
    """How a learning-rate group of a method differs from what the training settings say of its part of the model.

    Parameters
    ----------
    lr : float, optional
        Learning rate of its own, instead of that of the part.
    lr_factor : float
        What the learning rate is multiplied by.
    weight_decay : bool
        False: none, whatever the settings say.
    """

    lr: float | None = None
    lr_factor: float = 1.0
    weight_decay: bool = True


@dataclass(frozen=True)
class Report:
    """What an adaptation trains.

    Parameters
    ----------
    method : str
    tensors : tuple of TrainableTensor
        Trainable, declared and saved: one and the same list.
    cache_point : str or None
        The deepest intermediate result that training leaves unchanged, so that it may be computed once per input:
        ``embedding`` (output of the image encoder), ``trunk`` (input of its neck), ``block k`` (input of its
        attention block k), or None. Nothing behind it may be cached, since it is computed from trained tensors.
    mergeable : bool
        Whether `Adaptation.merge` is possible.
    depth : int
        Slices of a stack: the image encoder is to be given whole stacks, one after the other, each of neighbouring
        slices of one case and modality, of which the middle one is predicted. 1: single slices.
    """

    method: str
    tensors: tuple[TrainableTensor, ...]
    cache_point: str | None
    mergeable: bool
    depth: int = 1

    @property
    def count(self) -> int:
        """Number of trainable parameters."""
        return sum(tensor.count for tensor in self.tensors)


class Adaptation:
    """A method attached to a model.

    Parameters
    ----------
    model : Module
    config : MethodConfig
    edits : sequence of Edit
    expected_count : int
        Trainable parameters by the method's closed form; a different number is refused.
    cache_point : str, optional
        See `Report`.
    depth : int
        See `Report`.
    rules : mapping of str to GroupRule, optional
        Learning-rate groups of the edits that are trained otherwise than the settings say.

    Raises
    ------
    AdapterError
        Where another adaptation is attached, or the edits do not fit the model or the closed form.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        edits: Sequence[Edit],
        *,
        expected_count: int,
        cache_point: str | None = None,
        depth: int = 1,
        rules: Mapping[str, GroupRule] | None = None,
    ) -> None:
        self.model = model
        self.name = config.name
        self.config = config
        self.rules = dict(rules or {})
        self.edits = tuple(edits)
        self._trainable = {n: (p, edit.group_of(n)) for edit in self.edits for n, p in edit.trainable().items()}
        self._base_flags: list[tuple[nn.Parameter, bool]] = []
        self._attached = False
        self._disabled_depth = 0
        self.report = Report(
            self.name,
            tuple(TrainableTensor(name, tuple(p.shape), group) for name, (p, group) in self._trainable.items()),
            cache_point,
            all(edit.mergeable for edit in self.edits),
            depth,
        )
        if self.report.count != expected_count:
            raise AdapterError(
                f"method {self.name} declares {self.report.count} parameters, its closed form gives {expected_count}",
                remedy="This is a fault of the method; report it.",
            )
        self.reattach()

    @property
    def enabled(self) -> bool:
        """True while the model computes with the adaptation."""
        return self._attached and self._disabled_depth == 0

    def parameters_by_group(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by learning-rate group, in the report's order."""
        groups: dict[str, list[nn.Parameter]] = {}
        for parameter, group in self._trainable.values():
            groups.setdefault(group, []).append(parameter)
        return groups

    def state(self) -> dict[str, Tensor]:
        """Copies of the trainable tensors by name; training on does not change them."""
        return {name: parameter.detach().clone() for name, (parameter, _) in self._trainable.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in, in place, so that an optimiser built before keeps training what the model uses.

        Raises
        ------
        AdapterError
            Where a name is missing or unexpected, or a shape or type differs. Nothing is changed then.
        """
        problems = [f"missing {name}" for name in self._trainable if name not in state]
        problems += [f"unexpected {name}" for name in state if name not in self._trainable]
        for name, (parameter, _) in self._trainable.items():
            given = state.get(name)
            if given is not None and (given.shape != parameter.shape or given.dtype != parameter.dtype):
                problems.append(
                    f"{name} is {tuple(given.shape)} {given.dtype}, not {tuple(parameter.shape)} {parameter.dtype}"
                )
        if problems:
            listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise AdapterError(
                f"the tensors do not fit method {self.name} on this model: {listed}",
                remedy="Use the base model and the method options that the adapter was trained with.",
            )
        with torch.no_grad():
            for name, (parameter, _) in self._trainable.items():
                parameter.copy_(state[name])

    def merge(self) -> dict[str, Tensor]:
        """The adapted model as a state dict of the base model, for use without this package.

        Returns
        -------
        dict of str to Tensor
            The keys of the base model's ``state_dict()`` before the method was attached, in its order; copies.

        Raises
        ------
        AdapterError
            Where the method adds something that the base model's tensors cannot express.
        """
        if not self.report.mergeable:
            raise AdapterError(
                f"method {self.name} cannot be merged into the base model: it adds computation of its own",
                remedy="Keep the adapter file beside the base checkpoint.",
            )
        with self.disable():
            state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        for edit in self.edits:
            for name, tensor in edit.merged().items():
                if name not in state or state[name].shape != tensor.shape:
                    raise AdapterError(f"the base model has no tensor {name} of shape {tuple(tensor.shape)}")
                state[name] = tensor.clone()
        return state

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Within this context the model is the base model, bit for bit. Contexts may be nested."""
        if not self._attached:
            yield
            return
        if self._disabled_depth == 0:
            self._exchange(enable=False)
        self._disabled_depth += 1
        try:
            yield
        finally:
            self._disabled_depth -= 1
            if self._disabled_depth == 0:
                self._exchange(enable=True)

    def detach(self) -> None:
        """Give the model back as it was, its `requires_grad` flags included. The trained tensors stay here.

        Raises
        ------
        AdapterError
            Where it is detached already, or within `disable`.
        """
        if not self._attached or self._disabled_depth:
            raise AdapterError(f"method {self.name} is not attached, or is disabled at the moment")
        self._exchange(enable=False)
        for parameter, flag in self._base_flags:
            parameter.requires_grad_(flag)
        self._base_flags = []
        delattr(self.model, _MARK)
        self._attached = False

    def reattach(self) -> None:
        """Attach again after `detach`, with the tensors as they were trained.

        Raises
        ------
        AdapterError
            Where an adaptation is attached to the model.
        """
        other = attached_to(self.model)
        if other is not None:
            raise AdapterError(
                f"method {other.name} is attached to this model already", remedy="Detach it first: adaptation.detach()."
            )
        for edit in self.edits:
            if edit.current(self.model) is not edit.base:
                raise AdapterError(f"{edit.path} is not what method {self.name} was made for")
        self._base_flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for parameter, _ in self._base_flags:
            parameter.requires_grad_(False)
        self._exchange(enable=True)
        self._attached = True
        setattr(self.model, _MARK, self)
        trainable = {name for name, p in self.model.named_parameters() if p.requires_grad}
        if trainable != set(self._trainable):
            wrong = sorted(trainable ^ set(self._trainable))
            self.detach()
            raise AdapterError(f"method {self.name}: declared and trainable tensors differ: {wrong[:5]}")

    def _exchange(self, *, enable: bool) -> None:
        # Whole modules before what is in them, and back the other way: an edit's place is looked up in the model.
        inwards = sorted(self.edits, key=lambda edit: edit.path.count("."))
        for edit in inwards if enable else reversed(inwards):
            edit.exchange(self.model, enable=enable)


def swap(model: nn.Module, adaptation: Adaptation | None) -> Adaptation | None:
    """Attach another adaptation of a model instead of the one that is, by exchanging references: milliseconds.

    Parameters
    ----------
    model : Module
    adaptation : Adaptation or None
        Of this model; None leaves the base model.

    Returns
    -------
    Adaptation or None
        The one that was attached.

    Raises
    ------
    AdapterError
        Where it is another model's, or the model no longer has what it was made for. Nothing is changed then.
    """
    if adaptation is not None and adaptation.model is not model:
        raise AdapterError(
            f"method {adaptation.name} was made for another model", remedy="Attach it to this model with peft.attach."
        )
    before = attached_to(model)
    if before is adaptation:
        return before
    if before is not None:
        before.detach()
    try:
        if adaptation is not None:
            adaptation.reattach()
    except Exception:
        if before is not None:
            before.reattach()
        raise
    return before


def attached_to(model: nn.Module) -> Adaptation | None:
    """The adaptation attached to a model, if any."""
    return getattr(model, _MARK, None)

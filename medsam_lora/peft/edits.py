"""The one way in which methods change a model: exchanging an object of it for a trainable one, and back.

The base object, a parameter or a small module such as a Linear, is kept untouched. So taking an edit back gives the
base model bit for bit, by exchanging references and never by arithmetic on weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

Mixin = TypeVar("Mixin", bound=nn.Module)


@dataclass(frozen=True)
class Edit:
    """One exchange.

    Parameters
    ----------
    path : str
        Dotted name within the model of what is exchanged.
    base, adapted : Parameter or Module
        What stood there and what stands there while the adaptation is enabled. An adapted module may hold the base's
        own parameters, frozen, beside its new ones; it must keep the base's names for them, so that a state dict does
        not depend on the wrapping. Where its effect can be written into the base's tensors it has a method
        ``merged_state() -> dict[str, Tensor]`` that returns them.
    group : str or callable
        Which learning rate its tensors get: ``encoder`` or ``decoder``, or one of the method's own groups, such as
        ``encoder.B``. A callable is given a tensor's name within the adapted module.
    """

    path: str
    base: nn.Parameter | nn.Module
    adapted: nn.Parameter | nn.Module
    group: str | Callable[[str], str]

    def group_of(self, name: str) -> str:
        """The learning-rate group of one of `trainable`, by its name within the model."""
        return self.group if isinstance(self.group, str) else self.group(name.removeprefix(f"{self.path}."))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The new parameters by dotted name within the model."""
        if isinstance(self.adapted, nn.Parameter):
            return {self.path: self.adapted}
        kept = {id(p) for p in _parameters(self.base)}
        return {f"{self.path}.{name}": p for name, p in self.adapted.named_parameters() if id(p) not in kept}

    @property
    def mergeable(self) -> bool:
        """Whether the base's own tensors can have the adapted object's effect."""
        return isinstance(self.adapted, nn.Parameter) or hasattr(self.adapted, "merged_state")

    def merged(self) -> dict[str, Tensor]:
        """Values for the base's tensors, by dotted name within the model, that have the adapted object's effect."""
        if isinstance(self.adapted, nn.Parameter):
            return {self.path: self.adapted.detach()}
        merged_state: Callable[[], dict[str, Tensor]] = getattr(self.adapted, "merged_state")  # noqa: B009
        return {f"{self.path}.{name}": tensor for name, tensor in merged_state().items()}

    def current(self, model: nn.Module) -> object:
        """What stands at `path` in a model at the moment."""
        return getattr(*self._place(model))

    def exchange(self, model: nn.Module, *, enable: bool) -> None:
        """Put the adapted object at `path` of a model, or the base one."""
        leaving, entering = (self.base, self.adapted) if enable else (self.adapted, self.base)
        _follow(leaving, entering)
        owner, leaf = self._place(model)
        setattr(owner, leaf, entering)

    def _place(self, model: nn.Module) -> tuple[nn.Module, str]:
        owner, _, leaf = self.path.rpartition(".")
        return model.get_submodule(owner), leaf


def train_whole(model: nn.Module, part: str, group: str) -> list[Edit]:
    """Edits that train every parameter of one part of the model, starting from the base values.

    Parameters
    ----------
    model : Module
    part : str
        Dotted name of a submodule.
    group : str
    """
    return [
        Edit(f"{part}.{name}", parameter, nn.Parameter(parameter.detach().clone()), group)
        for name, parameter in model.get_submodule(part).named_parameters()
    ]


def extend(base: nn.Module, mixin: type[Mixin]) -> Mixin:
    """A module that is of `base`'s class and of `mixin`, and holds base's tensors and submodules under their names.

    Its `forward` is the mixin's, in which ``super().forward`` is the base's. The base itself is left as it is: what is
    added to the new module, or exchanged in it, does not show there.

    Parameters
    ----------
    base : Module
    mixin : type
        A subclass of `torch.nn.Module` without an ``__init__`` of its own.
    """
    module: Mixin = object.__new__(_class_of(mixin, type(base)))
    # The tables of parameters, buffers, submodules and hooks are copied, what is in them is shared.
    module.__dict__.update({k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(base).items()})
    return module


_CLASSES: dict[tuple[type, type], type] = {}


def _class_of(mixin: type, base: type) -> type:
    if (mixin, base) not in _CLASSES:
        _CLASSES[mixin, base] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})
    return _CLASSES[mixin, base]


def _parameters(item: nn.Parameter | nn.Module) -> list[nn.Parameter]:
    return [item] if isinstance(item, nn.Parameter) else list(item.parameters())


def _follow(leaving: nn.Parameter | nn.Module, entering: nn.Parameter | nn.Module) -> None:
    # The one that was not part of the model has missed model.to(device) and model.eval().
    for parameter in _parameters(leaving)[:1]:
        # Module.to moves parameters and their gradients in place, so that an optimiser still knows them.
        moved = nn.ParameterList([entering]) if isinstance(entering, nn.Parameter) else entering
        if any(other.device != parameter.device for other in (*moved.parameters(), *moved.buffers())):
            moved.to(parameter.device)
    if isinstance(leaving, nn.Module) and isinstance(entering, nn.Module):
        entering.train(leaving.training)

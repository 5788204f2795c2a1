"""Several adapters on one base model, switched in milliseconds without reading the base again.

bank = AdapterBank(build("vit_t"))
men, gli = bank.attach(Path("men.safetensors")), bank.attach(Path("gli.safetensors"))
segmenter = bank.swap(men)
with bank.disable():  # the base model
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medsam_lora.errors import AdapterError, nearest
from medsam_lora.models.assemble import put_in
from medsam_lora.models.checkpoint import both_bases, check_base, load_adapter
from medsam_lora.models.description import Description, described
from medsam_lora.models.fusion import build_fusion
from medsam_lora.models.sam import SamModel
from medsam_lora.models.segmenter import Segmenter
from medsam_lora.peft import attach
from medsam_lora.peft.contract import attached_to, swap


class AdapterBank:
    """A base model and the adapters that were attached to it, one of which is in use at a time.

    Parameters
    ----------
    sam : SamModel
        Without an adaptation.
    modalities : sequence of str, optional
        Channel order of the images; that of the first adapter by default. Adapters of other modalities are refused.

    Raises
    ------
    AdapterError
        Where an adaptation is attached to the model.
    """

    def __init__(self, sam: SamModel, modalities: Sequence[str] | None = None) -> None:
        other = attached_to(sam)
        if other is not None:
            raise AdapterError(f"method {other.name} is attached to this model", remedy="Detach it first.")
        self.sam = sam
        self.modalities = None if modalities is None else tuple(modalities)
        self.active: str | None = None
        self._segmenters: dict[str, Segmenter] = {}

    @property
    def names(self) -> list[str]:
        """The adapters, in the order they were attached."""
        return list(self._segmenters)

    def attach(self, path: Path, name: str | None = None) -> str:
        """Read an adapter file, without putting it to use.

        Parameters
        ----------
        path : Path
        name : str, optional
            What it is called from now on; the file's name without suffix by default.

        Returns
        -------
        str
            The name.

        Raises
        ------
        AdapterError
            Where the file is damaged, the name taken, or base weights, model, size, modalities or tensors do not fit;
            the hashes of both bases are named.
        """
        name = path.stem if name is None else name
        if name in self._segmenters:
            raise AdapterError(f"an adapter is called {name!r} already", path=path, remedy="Give it another name.")
        tensors, metadata = load_adapter(path)
        said = described(metadata, path)
        self._check(metadata, said, path)
        fusion = build_fusion(said.fusion.name, said.modalities)
        before = swap(self.sam, None)
        try:
            adaptation = attach(self.sam, said.method, said.seed)
            segmenter = Segmenter(self.sam, adaptation, fusion, said.input_spec, said.modalities, said.regions)
            try:
                put_in(segmenter, tensors, metadata, path)
            finally:
                adaptation.detach()
        finally:
            swap(self.sam, before)
        self.modalities = said.modalities
        self._segmenters[name] = segmenter.eval()
        return name

    def swap(self, name: str | None) -> Segmenter | None:
        """Put an adapter to use instead of the present one; None leaves the base model.

        Returns
        -------
        Segmenter or None
            With the adapter, on the shared base model. Segmenters of other adapters of the bank refuse to compute.

        Raises
        ------
        AdapterError
            Where no adapter has this name (the nearest one is named).
        """
        if name is None:
            swap(self.sam, None)
            self.active = None
            return None
        if name not in self._segmenters:
            guess = nearest(name, self.names)
            hint = f"; did you mean {guess}?" if guess else ""
            raise AdapterError(f"no adapter is called {name!r}{hint}", remedy=f"There are {', '.join(self.names)}.")
        segmenter = self._segmenters[name]
        swap(self.sam, segmenter.adaptation)
        segmenter.fusion.to(segmenter.device)
        self.active = name
        return segmenter

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Within this context the model is the base model, bit for bit."""
        adaptation = attached_to(self.sam)
        if adaptation is None:
            yield
            return
        with adaptation.disable():
            yield

    def _check(self, metadata: Mapping[str, Any], said: Description, path: Path) -> None:
        check_base(metadata, self.sam.name, self.sam.base_sha256, self.sam.image_size, path, self.sam.grid)
        if self.modalities is not None and said.modalities != self.modalities:
            raise AdapterError(
                f"the adapter was trained on {', '.join(said.modalities)}, the images are {', '.join(self.modalities)} "
                f"({both_bases(metadata, self.sam.base_sha256)})",
                path=path,
                remedy="Use a bank of its own, or an adapter of these modalities.",
            )

"""Columns of another local descriptor that follow a potential's own, for a model that should see more of a crystal.

The AEV of ANI looks 3.5 Angstrom far when it measures angles. Columns of SOAP, say, see further and in more detail;
their first-layer weights start at zero, so that the richer model is the start model until it is trained.

A column is linear in the descriptor, ``x = (d - shift) W``: the shift keeps the columns around zero on the training
atoms, ``W`` brings them to one size and, if asked, to a smaller number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from tlmc.descriptors.aev import BLOCK, BlockJacobian
from tlmc.descriptors.ani import AtomicEnvironmentVector
from tlmc.descriptors.base import Environments, LocalDescriptor, position_gradient, strain_gradient
from tlmc.descriptors.bispectrum import Bispectrum
from tlmc.descriptors.soap import SOAP
from tlmc.descriptors.symmetry_functions import SymmetryFunctions
from tlmc.equality import equal_by_content
from tlmc.errors import ConfigError

Compression = Literal["none", "species", "pca"]

KINDS: Final[dict[str, type[LocalDescriptor]]] = {
    "soap": SOAP,
    "symmetry_functions": SymmetryFunctions,
    "bispectrum": Bispectrum,
    "aev": AtomicEnvironmentVector,
}
"""Local descriptors by the name that a model file keeps."""

SOAP_DEFAULTS: Final[dict[str, Any]] = {"r_cut": 5.5, "n_max": 4, "l_max": 4, "sigma": 0.5, "cutoff": "cosine"}
"""SOAP with a cosine cutoff: value and slope vanish at ``r_cut``, as a potential needs."""


@equal_by_content
class EnergySlopes(NamedTuple):
    """What an energy that depends on the columns does to the atoms and the cell of one frame."""

    forces: Tensor
    """Minus the derivative with respect to the positions, shape ``(n_atoms, 3)``."""
    virial: Tensor
    """Derivative with respect to a strain, shape ``(3, 3)``."""


@equal_by_content
@dataclass(frozen=True, eq=False)
class Enrichment:
    """A local descriptor, and the linear map from its features to columns; computed in float64."""

    kind: str
    """A name of :data:`KINDS`."""
    parameters: dict[str, Any]
    """Arguments of the descriptor, JSON types, ``species`` included."""
    shift: Tensor
    """Shape ``(n_features,)``."""
    projection: Tensor
    """``W``, shape ``(n_features, n_columns)``; the number of columns is a multiple of 16, the last ones may be 0."""

    @cached_property
    def descriptor(self) -> LocalDescriptor:
        """The descriptor itself.

        Raises
        ------
        ConfigError
            If the kind or an argument is unknown or wrong.
        """
        if self.kind not in KINDS:
            raise ConfigError(f"richer columns come from {', '.join(KINDS)}, got {self.kind!r}")
        try:
            result = KINDS[self.kind](**self.parameters)
        except TypeError as error:
            raise ConfigError(f"{self.kind}: {error}") from error
        if result.averaged:
            raise ConfigError(f"{self.kind} must describe atoms, not whole structures: average = 'off'")
        return result

    @property
    def n_columns(self) -> int:
        """Number of columns."""
        return self.projection.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything the columns depend on."""
        result = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode())
        for tensor in (self.shift, self.projection):
            result.update(tensor.contiguous().numpy().tobytes())
        return result.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return kind and parameters; the two tensors are kept apart."""
        return {"kind": self.kind, "parameters": self.parameters}

    def columns(self, frame: Atoms, positions: Tensor | None = None) -> Tensor:
        """Return the columns of every atom, float64, shape ``(n_atoms, n_columns)``.

        Parameters
        ----------
        frame
            A molecule or crystal.
        positions
            The frame's own, as a tensor to differentiate with respect to (twice, if need be), shape ``(n_atoms, 3)``.
        """
        environments = self.descriptor.environments(frame)
        if positions is not None:
            ends = environments.neighbour, environments.atoms[environments.centre]
            moving, fixed = (x[ends[0]] - x[ends[1]] for x in (positions, positions.detach()))
            environments = environments._replace(vectors=environments.vectors + (moving - fixed))
        return self._columns(environments)

    def columns_and_jacobian(self, frame: Atoms) -> tuple[Tensor, BlockJacobian]:
        """Return the columns and their derivatives with respect to the positions, in blocks (a training cache)."""
        environments = self.descriptor.environments(frame)
        jacobian = self.descriptor.jacobian(environments)
        projected = jacobian._replace(values=torch.einsum("efx,fc->ecx", jacobian.values, self.projection))
        return self._columns(environments), projected.blocks()

    def columns_and_slopes(self, frame: Atoms) -> tuple[Tensor, Callable[[Tensor], EnergySlopes]]:
        """Return the columns, and what turns an energy's derivative by them into forces and virial; one evaluation.

        The derivative has shape ``(n_atoms, n_columns)``; it can be handed in once.
        """
        environments = self.descriptor.environments(frame)
        vectors = environments.vectors.requires_grad_()
        with torch.enable_grad():
            columns = self._columns(environments)

        def slopes(gradient: Tensor) -> EnergySlopes:
            slope = torch.autograd.grad(columns, vectors, gradient.to(columns.dtype))[0]
            fixed = environments._replace(vectors=vectors.detach())
            return EnergySlopes(-position_gradient(fixed, slope), strain_gradient(fixed, slope)[0])

        return columns.detach(), slopes

    def _columns(self, environments: Environments) -> Tensor:
        return (self.descriptor.values(environments) - self.shift) @ self.projection


def fit_enrichment(
    frames: Sequence[Atoms],
    kind: str = "soap",
    parameters: Mapping[str, Any] | None = None,
    *,
    species: Sequence[str] | None = None,
    compression: Compression = "none",
    n_columns: int = 128,
    scale: float = 1.0,
) -> Enrichment:
    """Choose shift and linear map so that the columns of some frames are centred and of one size.

    Parameters
    ----------
    frames
        The training part; validation and test play no role.
    kind, parameters
        Descriptor and its arguments without ``species``; for SOAP :data:`SOAP_DEFAULTS` fills in what is missing.
    species
        Elements with channels; those of the frames if not given.
    compression
        ``"none"`` keeps every feature. ``"species"``, of SOAP only, sums each feature over the element of its second
        density, so that their number grows linearly with that of elements (Darby et al., npj Comput. Mater. 8, 166,
        2022). ``"pca"`` keeps the `n_columns` principal components of the frames' atoms.
    n_columns
        Principal components to keep.
    scale
        Standard deviation of the columns over the atoms of the frames, root mean square over the columns; AdamW's
        steps are of one length for every weight, so this sets how fast the new columns learn.

    Raises
    ------
    ConfigError
        If kind, compression, a parameter, the number of columns or the scale is wrong.
    """
    if scale <= 0.0 or n_columns < 1:
        raise ConfigError(f"scale must be positive and n_columns at least 1, got {scale} and {n_columns}")
    elements = sorted({s for frame in frames for s in frame.symbols} if species is None else species)
    settings = {"species": elements, **(SOAP_DEFAULTS if kind == "soap" else {}), **(parameters or {})}
    bare = Enrichment(kind, settings, torch.empty(0), torch.empty(0, 0))
    features = torch.cat([bare.descriptor(frame) for frame in frames])
    shift = features.mean(0)
    matrix = _compression(bare.descriptor, features - shift, compression, n_columns)
    spread = ((features - shift) @ matrix).std(0, unbiased=False)
    if compression != "pca":
        # one size for all; features that are constant to rounding stay so
        matrix = matrix / torch.where(spread > 1e-6 * spread.max(), spread, torch.inf)
        matrix = scale * matrix
    else:
        matrix = scale * matrix / spread.square().mean().sqrt()
    filled = -(-matrix.shape[1] // BLOCK) * BLOCK
    return Enrichment(kind, settings, shift, torch.nn.functional.pad(matrix, (0, filled - matrix.shape[1])))


def _compression(descriptor: LocalDescriptor, centred: Tensor, compression: Compression, n_columns: int) -> Tensor:
    """Return the map from features to columns before it is scaled, ``(n_features, n_columns)``."""
    if compression == "none":
        return torch.eye(descriptor.n_features, dtype=torch.float64)
    if compression == "pca":
        kept = min(n_columns, descriptor.n_features)
        # eigenvectors of the covariance, largest first
        components: Tensor = torch.linalg.eigh(centred.T @ centred)[1].flip(1)[:, :kept]
        return components
    if compression == "species":
        if not isinstance(descriptor, SOAP):
            raise ConfigError("compression = 'species' is for SOAP, whose features belong to pairs of elements")
        return descriptor.summed_over_species()
    raise ConfigError(f"compression must be none, species or pca, got {compression!r}")

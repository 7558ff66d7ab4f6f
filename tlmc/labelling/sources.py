"""Where structures to label come from: PyXtal's CIFs, SMILES, and any file that ASE reads."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from ase import Atoms

from tlmc.errors import ConfigError, DataError
from tlmc.labelling.frames import template


def read_structure(source: str) -> Atoms:
    """Read a structure from ``pyxtal:<name>``, ``smiles:<SMILES>`` or, the last one, from a file.

    Parameters
    ----------
    source
        Of a SMILES the first conformer is taken; fragments (the ions of a salt) stand 6 Angstrom apart. Charges,
        moments and ``info`` of a file are kept, less labels.

    Raises
    ------
    ConfigError
        If PyXtal or RDKit is not installed, or PyXtal has no CIF of this name.
    DataError
        If the file or the SMILES cannot be read.
    """
    kind, _, name = source.partition(":")
    if kind == "smiles":
        return _side_by_side(molecules_from_smiles(name))
    return _read_file(_pyxtal_cif(name) if kind == "pyxtal" else Path(source))


def molecules_from_smiles(smiles: str, seed: int = 0) -> list[Atoms]:
    """Return a conformer of every fragment of a SMILES, embedded in space by RDKit (ETKDG).

    Parameters
    ----------
    smiles
        Fragments are parted by dots, ``"C1COCC[NH2+]1.[Cl-]"``; bonds to a metal may be dative, ``S->[Cu]``.
    seed
        Of the conformer.

    Returns
    -------
    list of Atoms
        In the order of the fragments, hydrogen included, not periodic and not relaxed. ``info["bonds"]`` holds the
        pairs of bonded atoms. Ions have the formal charges of their atoms as initial charges, radicals the unpaired
        electrons of theirs as initial magnetic moments.

    Raises
    ------
    ConfigError
        If RDKit is not installed.
    DataError
        If RDKit cannot read the SMILES or finds no conformer.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdDistGeom
    except ModuleNotFoundError as error:
        raise ConfigError("molecules from SMILES need RDKit: pip install 'tlmc[label]'") from error
    with rdBase.BlockLogs():
        whole = Chem.MolFromSmiles(smiles)
        if whole is None:
            raise DataError(f"RDKit cannot read the SMILES {smiles!r}")
        molecules = []
        for fragment in Chem.GetMolFrags(whole, asMols=True):
            molecule = Chem.AddHs(fragment)
            if rdDistGeom.EmbedMolecule(molecule, randomSeed=seed) != 0:
                raise DataError(f"RDKit finds no conformer of {Chem.MolToSmiles(fragment)} in {smiles!r}")
            positions = molecule.GetConformer().GetPositions()
            bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in molecule.GetBonds()]
            atoms = Atoms([atom.GetSymbol() for atom in molecule.GetAtoms()], positions)
            charges = [atom.GetFormalCharge() for atom in molecule.GetAtoms()]
            if sum(charges):  # what cancels inside a molecule, as in a nitro group, says nothing of it
                atoms.set_initial_charges(charges)
            unpaired = [atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()]
            if any(unpaired):
                atoms.set_initial_magnetic_moments(unpaired)
            atoms.info["bonds"] = sorted((min(pair), max(pair)) for pair in bonds)
            molecules.append(atoms)
    return molecules


def _side_by_side(molecules: list[Atoms], gap: float = 6.0) -> Atoms:
    """Return molecules in a row along x, ``gap`` Angstrom from one to the next."""
    row = Atoms()
    for molecule in molecules:
        moved = molecule.copy()
        if len(row):
            moved.positions[:, 0] += row.positions[:, 0].max() + gap - moved.positions[:, 0].min()
        row += moved
    return row


def _pyxtal_cif(name: str) -> Path:
    # found without importing PyXtal, which takes seconds
    spec = importlib.util.find_spec("pyxtal")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(f"pyxtal:{name} needs PyXtal: pip install 'tlmc[label]'")
    path = Path(spec.submodule_search_locations[0], "database", "cifs", name + ".cif")
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.cif")))
        raise ConfigError(f"PyXtal has no CIF {name!r}; it has {known}")
    return path


def _read_file(path: Path) -> Atoms:
    from tlmc.data.loading import read_frames

    with warnings.catch_warnings():
        # the symmetry operations listed in the file are used, so the setting it names is not needed
        warnings.filterwarnings("ignore", "crystal system .* is not interpreted", UserWarning)
        return template(read_frames(path)[-1])

"""Which steps of an output file are not self-consistent, as its text says; ASE reads their labels like any others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError, iterparse

# What the programs print whose outputs ASE reads, where the step cannot be told cheaply.
_COMPLAINTS = re.compile(
    r"convergence NOT achieved|SCF (?:run )?(?:is )?NOT CONVERGED|Wavefunction not fully converged|"
    r"Convergence failure -- run terminated|Calculation failed to converge|"
    r"max\. SCF cycles performed but system has not reached|Did not converge!",
    re.IGNORECASE,
)
_OUTPUTS = (
    "aims-output", "castep-castep", "espresso-out", "gaussian-out", "gpaw-out", "nwchem-out", "onetep-out",
    "orca-output",
)  # fmt: skip
_VASP_STEP = "FREE ENERGIE OF THE ION-ELECTRON SYSTEM"


class Convergence(NamedTuple):
    """What the text of a file says besides the labels."""

    unconverged: dict[int, str]
    """Frame, counted as ASE does, and what the file says of it."""
    remarks: list[str]
    """What concerns the file, or frames that cannot be told."""


def read_convergence(path: Path, file_format: str) -> Convergence:
    """Look for electronic steps that did not converge, and for an end that is missing.

    VASP writes both into OUTCAR and vasprun.xml. Its version 5 says ``aborting loop because EDIFF is reached`` even
    where the loop ended only because its NELM steps were used up, so these are counted. Of other outputs the lines
    are found that complain; with one frame it is the one.

    Parameters
    ----------
    path
        A file that is not compressed.
    file_format
        ASE's name of its format.
    """
    if file_format == "vasp-out":
        return _outcar(path)
    if file_format == "vasp-xml":
        return _vasprun(path)
    remarks = []
    if file_format in _OUTPUTS:
        with path.open(errors="replace") as stream:
            remarks = [
                f"line {n} says: {line.strip():.100}" for n, line in enumerate(stream, 1) if _COMPLAINTS.search(line)
            ]
    return Convergence({}, remarks)


def _outcar(path: Path) -> Convergence:
    unconverged: dict[int, str] = {}
    step, electronic, most, failed, old = 0, 0, 0, "", False
    with path.open(errors="replace") as stream:
        for n, line in enumerate(stream):
            if not n:
                old = bool(re.search(r"vasp\.[45]\.", line))
            if not most and (found := re.match(r"\s*NELM\s*=\s*(\d+)", line)):
                most = int(found[1])
            elif "Iteration" in line and (found := re.search(r"Iteration\s+\d+\(\s*(\d+)\)", line)):
                electronic = int(found[1])
            elif "aborting loop" in line:
                if "EDIFF is reached" not in line:
                    failed = " ".join(line.replace("-", " ").split())
                elif old and most > 1 and electronic >= most:
                    failed = f"all NELM = {most} electronic steps were used up"
            elif _VASP_STEP in line:
                if failed:
                    unconverged[step] = failed
                step, electronic, failed = step + 1, 0, ""
    remarks = [f"ends within ionic step {step + 1}, which is not read"] if electronic else []
    return Convergence(unconverged, remarks)


def _vasprun(path: Path) -> Convergence:
    unconverged: dict[int, str] = {}
    remarks: list[str] = []
    step, most = 0, 0
    try:
        for _, element in iterparse(path):
            if element.tag == "i" and element.get("name") == "NELM":
                text = (element.text or "").strip()
                most = int(text) if text.isdigit() else 0
            elif element.tag == "calculation":
                if 1 < most <= len(element.findall("scstep")):
                    unconverged[step] = f"all NELM = {most} electronic steps were used up"
                step += 1
                element.clear()
    except ParseError as error:
        remarks.append(f"is cut off in or after ionic step {step + 1} ({error}); what is read ends there")
    return Convergence(unconverged, remarks)

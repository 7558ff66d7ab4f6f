from __future__ import annotations

import gzip
import logging
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest

from helpers.argon import argon
from tlmc.data.loading import load_dataset, read_frames
from tlmc.errors import DataError

N_FRAMES = 4


@pytest.fixture(scope="module")
def lines() -> list[list[str]]:
    """The lines of four frames of four atoms: number, header, atoms with positions and forces."""
    frames = []
    for frame in argon(N_FRAMES):
        results = frame.calc.results
        cell = " ".join(f"{x:.8f}" for x in frame.cell.array.ravel())
        frames.append(
            [
                "4",
                f'Lattice="{cell}" Properties=species:S:1:pos:R:3:forces:R:3 '
                f'energy={results["energy"]:.10f} pbc="T T T"',
            ]
            + [
                f"Ar {' '.join(f'{x:.8f}' for x in [*position, *force])}"
                for position, force in zip(frame.positions, results["forces"], strict=True)
            ]
        )
    return frames


def text(frames: list[list[str]], between: str = "") -> str:
    return between.join("".join(f"{line}\n" for line in frame) for frame in frames)


def with_headers(frames: list[list[str]], change: Callable[[str], str]) -> list[list[str]]:
    return [[frame[0], change(frame[1]), *frame[2:]] for frame in frames]


def is_right(path: Path) -> None:
    dataset = load_dataset(path)
    expected = argon(N_FRAMES)
    assert len(dataset) == N_FRAMES
    assert dataset.is_crystal.all()
    for k, frame in enumerate(expected):
        np.testing.assert_allclose(dataset.frames[k].positions, frame.positions, atol=1e-8)
        np.testing.assert_allclose(dataset.frames[k].cell.array, frame.cell.array, atol=1e-8)
        np.testing.assert_allclose(dataset.energies[k], frame.calc.results["energy"], atol=1e-9)
        np.testing.assert_allclose(dataset.forces[k], frame.calc.results["forces"], atol=1e-8)


# --- frames and what lies between them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "tail", "head"),
    [("\n", "", ""), ("  \n\t\n\n", "", ""), ("", "\n\n \n", ""), ("", "", "\n\n"), ("\n", "\n", "\n")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "a.extxyz.gz", "a.xyz.xz"])
def test_blank_lines_between_frames_end_nothing(
    tmp_path: Path, lines: list[list[str]], between: str, tail: str, head: str, end: str, name: str
) -> None:
    content = (head + text(lines, between) + tail).replace("\n", end).encode()
    pack = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(content))
    is_right(tmp_path / name)


def test_plain_xyz_with_blank_comments_and_blank_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.74\n\n1\n\nO 0 0 0\n\n\n1\nHe = helium's\nHe 0 0 1 0.5\n")
    frames = read_frames(tmp_path / "a.xyz")
    assert [str(frame.symbols) for frame in frames] == ["H2", "O", "He"]
    assert "a.xyz: frame 2: columns after the coordinates are not read, Properties does not name them" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_read(tmp_path: Path, lines: list[list[str]], encoding: str) -> None:
    (tmp_path / "a.xyz").write_text(text(lines), encoding=encoding)
    is_right(tmp_path / "a.xyz")


def test_a_comment_of_another_encoding_is_no_obstacle(tmp_path: Path, lines: list[list[str]]) -> None:
    content = text(with_headers(lines, lambda header: f"{header} unit_of_nothing=Å"))
    (tmp_path / "a.xyz").write_bytes(content.encode("latin-1"))
    is_right(tmp_path / "a.xyz")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t + "# the end\n",
            r"line 25 must be the number of atoms of frame 4, got '# the end'; the frame before",
        ),
        (lambda t: t.replace("4\nL", "3\nL", 1), "line 6 must be the number of atoms of frame 1, got 'Ar"),
        (lambda t: t.replace("4\nL", "5\nL", 1), r"frame 0: line 7 must be atom 4 of 5 in 7 columns .*, got '4'"),
        (lambda t: t.replace("4\nL", "4.0\nL", 1), "line 1 must be the number of atoms of frame 0, got '4.0'"),
        (lambda t: t.replace("4\nL", "-4\nL", 1), "line 1 must be the number of atoms of frame 0, got '-4'"),
        (lambda t: t[: t.rindex("Ar")], "frame 3: Frame has 3 atoms, expected 4: the file ends before line 24"),
        (lambda t: t[:-30], r"frame 3: line 24 must be atom 3 of 4 in 7 columns \(species, pos, forces\), got 'Ar"),
        (lambda t: t + "4\n", "frame 4: Frame has 0 atoms, expected 4: the file ends before line 30"),
        (lambda t: t.replace("\nAr", "\n\nAr", 2), "frame 0: line 3 must be atom 0 of 4 in 7 columns .*, got ''"),
        (lambda t: t.replace("\nL", "\n\nL", 1), "frame 0: line 3: atom 0 is of an unknown element: 'Lattice"),
        (lambda t: t[:-1] + " 1.0\n", "frame 3: line 24 must be atom 3 of 4 in 7 columns .*, got 'Ar"),
        (lambda t: t[: t.rindex("Ar")] + "Xe" + t[t.rindex("Ar") + 2 : -20] + "1,5 0.1 2\n", "frame 3: line 24.*"),
    ],
)
def test_what_would_go_unread_is_named(
    tmp_path: Path, lines: list[list[str]], change: Callable[[str], str], sentence: str
) -> None:
    (tmp_path / "a.xyz").write_text(change(text(lines)))
    with pytest.raises(DataError, match=rf"a.xyz: (Expected xyz header: )?{sentence}"):
        load_dataset(tmp_path / "a.xyz")


def test_a_last_number_that_is_cut_is_noticed(
    tmp_path: Path, lines: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.xyz").write_text(text(lines)[:-3])
    load_dataset(tmp_path / "a.xyz")
    assert "a.xyz: frame 3: the file ends without a line's end and with fewer digits than before" in caplog.text
    caplog.clear()
    (tmp_path / "a.xyz").write_text(text(lines)[:-1])
    load_dataset(tmp_path / "a.xyz")
    assert "ends without" not in caplog.text


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.replace("Lattice", "lattice"),
        lambda h: h.replace("Lattice", "LATTICE").replace(' pbc="T T T"', ""),
        lambda h: h.replace("Lattice", "lattice").replace("Properties", "properties").replace("pbc", "PBC"),
        lambda h: h.replace("Lattice", "cell"),
        lambda h: h.replace("Lattice", "Unit_Cell").replace(' pbc="T T T"', ""),
        lambda h: re.sub('Lattice="([^"]*)"', lambda m: f'cell="[[{m[1].replace(" ", ", ")}]]"', h),
        lambda h: re.sub('Lattice="([^"]*)"', r'\g<0> cell="\1"', h),
        lambda h: h.replace('pbc="T T T"', 'pbc="1 1 1"'),
        lambda h: h.replace('pbc="T T T"', "pbc=TTT"),
        lambda h: h.replace('pbc="T T T"', "pbc=T"),
        lambda h: h.replace("species:S:1:pos:R:3:forces", "Species:s:1:POS:r:3:forces"),
        lambda h: h.replace("forces", "Forces").replace("energy", "Energy"),
        # as GPUMD writes it
        lambda h: h.replace("Lattice", "lattice").replace("Properties", "properties").replace("forces", "force"),
        lambda h: h.replace(" ", "\t"),
        lambda h: h.replace("5.30000000", "0.53000000D+01"),
        lambda h: re.sub(r"energy=(-?)(\d)\.(\d+)", r"energy=\g<1>\2\3.0D-10", h),
    ],
)
def test_structure_and_labels_in_any_letter_case(
    tmp_path: Path, lines: list[list[str]], change: Callable[[str], str]
) -> None:
    changed = with_headers(lines, change)
    assert changed != lines
    (tmp_path / "a.xyz").write_text(text(changed))
    is_right(tmp_path / "a.xyz")
    assert not {"lattice", "cell", "pbc", "properties"} & {*map(str.lower, read_frames(tmp_path / "a.xyz")[0].info)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda h: h.replace('Lattice="5.30000000 ', 'lattice="'),
            r"frame 0: lattice must be nine numbers, .*, got '\[",
        ),
        (lambda h: re.sub('Lattice="[^"]*"', "Lattice=5.3", h), "frame 0: Lattice must be nine numbers, .*, got '5.3'"),
        (lambda h: re.sub('"5.3.*?"', '"a b c"', h), "frame 0: Lattice must be nine numbers, .*, got 'a b c'"),
        (lambda h: re.sub('Lattice="[^"]*"', 'cell="5 5 5 90 90 90"', h), "frame 0: cell must be nine numbers"),
        (lambda h: h + ' cell="1 0 0 0 1 0 0 0 1"', "frame 0: Lattice and cell are different cells"),
        (lambda h: h + ' lattice="1 0 0 0 1 0 0 0 1"', "frame 0: line 2 says lattice twice"),
        (lambda h: h + " energy=-2", "frame 0: line 2 says energy twice"),
        (lambda h: h.replace("T T T", "yes T T"), "frame 0: pbc must be three of T and F, got 'yes T T'"),
        (lambda h: h.replace("T T T", "T T"), r"frame 0: pbc must be three of T and F, got '\[True, True\]'"),
        (lambda h: h.replace("energy", "title=Bob's energy"), "frame 0: line 2 has a ' that is not closed"),
        (lambda h: h.replace("energy", 'title="x energy'), 'frame 0: line 2 has a " that is not closed'),
        (lambda h: h.replace("species", "kind"), "frame 0: Properties names no species or no positions"),
        (lambda h: h.replace("pos:R", "place:R"), "frame 0: Properties names no species or no positions"),
        (lambda h: h.replace("forces:R:3", "forces:R"), "frame 0: Properties must be name:type:columns"),
        (lambda h: h.replace("forces:R:3", "Pos:R:3"), "frame 0: Properties names a column twice"),
        (lambda h: h.replace("energy=", "dipole=big energy="), r"frame 0 \(line 1\): ASE cannot read it \(ValueError"),
    ],
)
def test_headers_that_contradict_themselves(
    tmp_path: Path, lines: list[list[str]], change: Callable[[str], str], sentence: str
) -> None:
    (tmp_path / "a.xyz").write_text(text(with_headers(lines, change)))
    with pytest.raises(DataError, match=f"a.xyz: {sentence}"):
        load_dataset(tmp_path / "a.xyz")


@pytest.mark.parametrize("no", ['"F F F"', "FFF", '"0 0 0"', "F"])
def test_a_cell_without_periodicity_is_read_as_said_and_noted(
    tmp_path: Path, lines: list[list[str]], caplog: pytest.LogCaptureFixture, no: str
) -> None:
    (tmp_path / "a.xyz").write_text(text(with_headers(lines, lambda h: h.replace('"T T T"', no))))
    assert not load_dataset(tmp_path / "a.xyz").is_crystal.any()
    assert "a.xyz: frame 0 (and 3 more frames): has a cell but is periodic along nothing (pbc)" in caplog.text


def test_a_lattice_that_only_some_frames_have_is_noted(
    tmp_path: Path, lines: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    bare = with_headers(lines[:2], lambda h: re.sub('Lattice="[^"]*" | pbc="T T T"', "", h))
    (tmp_path / "a.xyz").write_text(text(bare + lines[2:]))
    assert load_dataset(tmp_path / "a.xyz").is_crystal.tolist() == [False, False, True, True]
    assert "frame 0 (and 1 more frame): not periodic, but frame 2 of the same atoms is: is a latt" in caplog.text


def test_a_cell_left_in_info_by_another_reader_is_refused(tmp_path: Path, lines: list[list[str]]) -> None:
    (tmp_path / "a.xyz").write_text(text(with_headers(lines, lambda h: h.replace("Lattice", "lattice"))))
    frames = ase.io.read(tmp_path / "a.xyz", ":")
    for frame in frames:
        frame.pbc = False
    ase.io.write(tmp_path / "b.traj", frames)
    with pytest.raises(DataError, match=r"b.traj: frame 0 has a cell in info\['lattice'\] and none where ASE looks"):
        load_dataset(tmp_path / "b.traj")


def test_cell_vectors_after_the_atoms_keep_the_labels(tmp_path: Path, lines: list[list[str]]) -> None:
    bare = with_headers(lines, lambda h: re.sub('Lattice="[^"]*" | pbc="T T T"', "", h))
    (tmp_path / "a.xyz").write_text(text([[*frame, "VEC1 5.3 0 0", "VEC2 0 5.3 0", "VEC3 0 0 5.3"] for frame in bare]))
    is_right(tmp_path / "a.xyz")
    (tmp_path / "a.xyz").write_text(text([[*frame, "VEC1 5.3 0"] for frame in bare]))
    with pytest.raises(DataError, match="frame 0: cell vector 1 after the atoms cannot be understood: 'VEC1 5.3 0'"):
        load_dataset(tmp_path / "a.xyz")


# --- atoms -----------------------------------------------------------------------------------------------------------


def test_exponents_of_fortran_are_read_and_said(
    tmp_path: Path, lines: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    changed = [[*frame[:-1], re.sub(r"(\d+\.\d+)$", r"\1D+00", frame[-1])] for frame in lines]
    (tmp_path / "a.xyz").write_text(text(changed))
    is_right(tmp_path / "a.xyz")
    assert "a.xyz: frame 0 (and 3 more frames): exponents written with D (1.0D+01) are read as" in caplog.text


@pytest.mark.parametrize(("symbol", "name"), [("D", "deuterium"), ("T", "tritium"), ("d", "deuterium")])
def test_heavy_hydrogen_is_hydrogen_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, symbol: str, name: str
) -> None:
    (tmp_path / "a.xyz").write_text(f"1\n\nO 0 0 0\n2\n\n{symbol} 0 0 0\nh 0 0 0.74\n")
    assert [str(frame.symbols) for frame in read_frames(tmp_path / "a.xyz")] == ["O", "H2"]
    assert f"a.xyz: frame 1: {symbol.upper()} ({name}) is read as H" in caplog.text


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("Ar ", "Xx ", "atom 0 is of an unknown element: 'Xx'"),
        ("Ar ", "18 ", "atom 0 is of an unknown element: '18': atomic numbers need Properties with Z:I:1"),
        ("Ar ", "Ar1 ", "atom 0 is of an unknown element: 'Ar1'"),
        (".", ",", "pos of atom 0 is no number: '-?[0-9]+,[0-9]+': is it a decimal comma"),
        (".", "x", "pos of atom 0 is no number: '-?[0-9]+x[0-9]+'"),
    ],
)
def test_atoms_that_cannot_be_read_are_named(
    tmp_path: Path, lines: list[list[str]], old: str, new: str, sentence: str
) -> None:
    changed = [[*frame] for frame in lines]
    changed[2][2] = changed[2][2].replace(old, new, 1)
    (tmp_path / "a.xyz").write_text(text(changed))
    with pytest.raises(DataError, match=rf"a.xyz: frame 2: line 15: {sentence}"):
        load_dataset(tmp_path / "a.xyz")


def test_frames_are_those_of_ase(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = argon(3)
    for k, frame in enumerate(frames):
        frame.info = {"group": f"a {k}", "numbers": np.arange(3), "flag": k == 1}
    ase.io.write(tmp_path / "a.extxyz", frames)
    with caplog.at_level(logging.INFO):
        found = read_frames(tmp_path / "a.extxyz")
    for one, other in zip(found, ase.io.read(tmp_path / "a.extxyz", ":"), strict=True):
        assert one == other
        assert [*one.info] == [*other.info]
        assert [*one.calc.results] == [*other.calc.results]
        for key, value in other.calc.results.items():
            np.testing.assert_array_equal(one.calc.results[key], value)
    assert not caplog.text

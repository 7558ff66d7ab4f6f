"""What a notebook shows: errors of ours as one red sentence, whoever runs it, and bars that a front-end can draw."""

from __future__ import annotations

from importlib.metadata import distribution

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import v4
from papermill.exceptions import PapermillExecutionError

from tlmc.errors import ConfigError, DataError, ModelError, OneSentence, StudyError, TlmcError
from tlmc.study.runner import kernel_environment

# nbformat and the kernel's sockets warn about things outside this package
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CAUSES = """
from tlmc.errors import DataError
try:
    {}["a"]
except KeyError as error:
    raise DataError("a.traj: <b>") from error
"""
INTERRUPTED = """
from tlmc.errors import OneSentence
class Saved(OneSentence, KeyboardInterrupt): pass
raise Saved("kept")
"""


@pytest.fixture
def notebook():
    return lambda *sources: v4.new_notebook(
        cells=[v4.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        ("from tlmc.training import recipe\nrecipe('no such')", "ConfigError", "there is no recipe 'no such'"),
        ("import tlmc\ntlmc.load_dataset('naphtalene')", "DataError", "did you mean naphthalene"),
        (CAUSES, "DataError", "a.traj: <b>"),
        (INTERRUPTED, "Saved", "kept"),
    ],
)
def test_a_cell_shows_the_sentence_and_no_traceback(notebook, source, kind, sentence, tmp_path):
    asked = notebook(source, "print('not reached')")
    with kernel_environment(tmp_path), pytest.raises(CellExecutionError, match="(?s)" + kind):
        NotebookClient(asked, timeout=120, kernel_name="python3").execute()
    [output] = asked.cells[0].outputs
    assert output.output_type == "error"
    assert output.ename == kind
    assert sentence in output.evalue
    assert output.traceback == [f"\x1b[31m{kind}: {output.evalue}\x1b[0m"]
    assert not asked.cells[1].outputs


def test_other_errors_keep_their_traceback(notebook, tmp_path):
    asked = notebook("import tlmc\ndef f(): return 1 / 0\nf()")
    with kernel_environment(tmp_path), pytest.raises(CellExecutionError):
        NotebookClient(asked, timeout=120, kernel_name="python3").execute()
    assert "f()" in "\n".join(asked.cells[0].outputs[0].traceback)


@pytest.mark.slow
def test_papermill_fails_and_says_the_sentence_once(notebook, tmp_path):
    nbformat.write(notebook("from tlmc.training import recipe", "recipe('no such')"), tmp_path / "in.ipynb")
    with kernel_environment(tmp_path), pytest.raises(PapermillExecutionError) as caught:
        papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False)
    assert caught.value.ename == "ConfigError"
    assert str(caught.value).count("there is no recipe 'no such'") == 1
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("kind", [DataError, ModelError, ConfigError, StudyError])
def test_outside_a_notebook_nothing_changes(kind):
    with pytest.raises(ValueError, match="^a sentence$") as caught:
        raise kind("a sentence")
    assert isinstance(caught.value, TlmcError)
    assert isinstance(caught.value, OneSentence)


def test_bars_are_widgets_and_jupyterlab_has_their_front_end(notebook, tmp_path):
    asked = notebook("from tqdm.auto import tqdm\nfor _ in tqdm(range(2), desc='epochs'):\n    pass")
    with kernel_environment(tmp_path):
        NotebookClient(asked, timeout=120, kernel_name="python3").execute()
    [output] = asked.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in output.data
    files = distribution("jupyterlab-widgets").files or []
    assert [path for path in files if path.match("labextensions/@jupyter-widgets/jupyterlab-manager/package.json")]

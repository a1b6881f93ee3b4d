"""What several tools share: figures that cannot be written after the work."""

import json
import tempfile

import pytest

from pop.errors import InputError
from tools.common import write_figures


def test_figures_that_cannot_be_written_are_written_elsewhere(tmp_path, monkeypatch):
    """The first error is raised if there is no other place either."""
    for folder, told in ((tmp_path, "it is in "), (tmp_path / "missing", "choose another path$")):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        with pytest.raises(InputError, match=f"nowhere/out.json.*{told}") as caught:
            write_figures(str(tmp_path / "nowhere" / "out.json"), {"seconds": 1.5})
    assert caught.value.__suppress_context__
    (saved,) = tmp_path.glob("pop-*/out.json")
    assert json.loads(saved.read_text()) == {"seconds": 1.5}

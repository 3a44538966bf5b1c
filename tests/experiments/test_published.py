"""Every published number that needs no training is ours too: the fast rows of experiments/published.py."""

import pytest

from experiments import published
from tests.published_votes import FOLDER


@pytest.mark.parametrize("job", published.OWN, ids=lambda job: job.__name__)
def test_what_needs_no_file_holds(job):
    for row in job(published.REFERENCE):
        assert row.holds, row


@pytest.mark.skipif(not FOLDER.exists(), reason="the published data are not shipped")
@pytest.mark.parametrize("job", published.FROM_FILES, ids=lambda job: job.__name__)
def test_published_values_hold(job):
    for row in job(published.REFERENCE):
        assert row.holds, row


def test_missing_data_are_named_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    words = ["published.py", "--fast", "--reference", str(tmp_path / "none"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        published.main()
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "llmbar: " in out and "CC BY-NC" in out
    assert "Krippendorff" in (tmp_path / "published.md").read_text()

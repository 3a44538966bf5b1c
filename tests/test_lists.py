"""tests/quick.txt and tests/slow.txt name tests that exist."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["quick.txt", "slow.txt"])
def test_every_line_names_a_test(name):
    lines = (ROOT / "tests" / name).read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    missing = []
    for line in lines:
        file, _, test = line.partition("::")
        path = ROOT / file
        if not path.is_file() or test and f"def {test.partition('[')[0]}(" not in path.read_text(encoding="utf-8"):
            missing.append(line)
    assert lines and not missing
    assert len(set(lines)) == len(lines)

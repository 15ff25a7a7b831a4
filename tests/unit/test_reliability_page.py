"""Every test that docs/reliability.md names exists, and every promise has one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| R(\d+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "reliability.md").read_text("utf-8"), re.MULTILINE
)


def test_every_promise_has_a_row():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 45))


def test_every_test_named_there_exists():
    for _, _, tests in ROWS:
        names = re.findall(r"`([^`]+)`", tests)
        assert names
        for name in names:
            file, _, test = name.partition("::")
            if file.startswith("make "):
                continue
            text = (ROOT / "tests" / file).read_text("utf-8")
            assert not test or f"def {test}(" in text, name

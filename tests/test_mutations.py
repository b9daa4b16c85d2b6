"""The defects that `tests/mutations.py` plants can still be planted, and their tests are still there."""

from __future__ import annotations

import pytest
from mutations import DEFECTS, ROOT, Defect


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_can_be_planted(defect: Defect) -> None:
    text = (ROOT / defect.file).read_text()
    for old, new in defect.texts:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file, _, name = defect.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()

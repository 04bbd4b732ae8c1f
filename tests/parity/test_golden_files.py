"""No golden file lies unused: each is loaded, by name or by pattern, in one of the modules here."""

import re
from fnmatch import fnmatch
from pathlib import Path

from .support import GOLDEN

LOADED = re.compile(r'\b(?:load|load_json|golden_names)\("([^"]+)"\)')


def test_every_golden_file_is_matched_by_a_test() -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    patterns = {pattern for source in sources for pattern in LOADED.findall(source)}
    data = [path.name for path in GOLDEN.iterdir() if path.suffix in (".npz", ".json")]
    assert len(data) >= 16
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []

from __future__ import annotations

from trainers.viewer import page_files
from trainers.viewer.typescript import typescript


def test_the_pages_records_are_those_of_the_server() -> None:
    """Else: `python -m trainers.viewer.typescript > trainers/viewer/web/src/records.ts`."""
    assert (page_files.FOLDER.parent / "web" / "src" / "records.ts").read_text() == typescript()

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torture import report  # noqa: E402


def pytest_terminal_summary(terminalreporter):
    if report.LINES:
        terminalreporter.write_line(report.table())

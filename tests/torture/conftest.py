import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torture import report  # noqa: E402


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        report.FILE.unlink(missing_ok=True)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(report.table())

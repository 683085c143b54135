"""Exporting takes seconds a run: it is done where it is tested."""

import pytest

from experiments import exporting

EXPORTING = {"test_annealing", "test_exporting", "test_demo", "test_yardstick"}


@pytest.fixture(autouse=True)
def _no_export(request, monkeypatch):
    if request.path.stem not in EXPORTING:
        monkeypatch.setattr(exporting, "export_functions", lambda *args, **others: None)

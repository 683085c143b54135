"""Judges: log p(x) and how far to trust it."""

from vdiff.evaluate.checks.model import Check as Check
from vdiff.evaluate.checks.model import ModelReport as ModelReport
from vdiff.evaluate.checks.model import check_model as check_model
from vdiff.evaluate.dataset import Summary as Summary
from vdiff.evaluate.dataset import evaluate as evaluate
from vdiff.evaluate.dataset import summarize as summarize
from vdiff.evaluate.diagnostics import Units as Units
from vdiff.evaluate.diagnostics import active_units as active_units
from vdiff.evaluate.gradients import GradientReport as GradientReport
from vdiff.evaluate.gradients import gradient_report as gradient_report
from vdiff.evaluate.importance import importance_log_prob as importance_log_prob

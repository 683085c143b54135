"""Judges: log p(x) and how far to trust it."""

from vdiff.evaluate.checks.model import Check as Check
from vdiff.evaluate.checks.model import ModelReport as ModelReport
from vdiff.evaluate.checks.model import check_model as check_model
from vdiff.evaluate.dataset import Summary as Summary
from vdiff.evaluate.dataset import evaluate as evaluate
from vdiff.evaluate.dataset import summarize as summarize
from vdiff.evaluate.dataset import untrusted_share as untrusted_share
from vdiff.evaluate.diagnostics import Units as Units
from vdiff.evaluate.diagnostics import active_units as active_units
from vdiff.evaluate.gradients import GradientReport as GradientReport
from vdiff.evaluate.gradients import gradient_report as gradient_report
from vdiff.evaluate.grid import grid_log_normalizer as grid_log_normalizer
from vdiff.evaluate.grid import grid_points as grid_points
from vdiff.evaluate.importance import importance_log_prob as importance_log_prob
from vdiff.evaluate.psis import k_hat as k_hat
from vdiff.evaluate.transitions import LogDensity as LogDensity
from vdiff.evaluate.transitions import Transition as Transition
from vdiff.evaluate.transitions import hmc as hmc
from vdiff.evaluate.transitions import langevin as langevin
from vdiff.evaluate.transitions import nuts as nuts
from vdiff.evaluate.transitions import repeated as repeated
from vdiff.evaluate.transitions import unadjusted_langevin as unadjusted_langevin
from vdiff.evaluate.two_sample import TwoSample as TwoSample
from vdiff.evaluate.two_sample import classifier_two_sample as classifier_two_sample

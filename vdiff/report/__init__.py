"""Pictures and one self-contained page a run."""

from vdiff.report.curves import load_metrics as load_metrics
from vdiff.report.curves import training_curves as training_curves
from vdiff.report.figures import kl_per_unit as kl_per_unit
from vdiff.report.figures import latent_scatter as latent_scatter
from vdiff.report.figures import mixture_plot as mixture_plot
from vdiff.report.figures import principal_plane as principal_plane
from vdiff.report.images import image_grid as image_grid
from vdiff.report.images import reconstruction_grid as reconstruction_grid
from vdiff.report.index import FactTable as FactTable
from vdiff.report.index import RunEntry as RunEntry
from vdiff.report.index import write_index as write_index
from vdiff.report.landscapes import landscape as landscape
from vdiff.report.lines import Panel as Panel
from vdiff.report.lines import line_panels as line_panels
from vdiff.report.page import FigureEntry as FigureEntry
from vdiff.report.page import Table as Table
from vdiff.report.page import Tile as Tile
from vdiff.report.page import metric_tiles as metric_tiles
from vdiff.report.page import write_page as write_page
from vdiff.report.predictive import predictive_grid as predictive_grid
from vdiff.report.predictive import predictive_spread as predictive_spread
from vdiff.report.rates import rate_curve as rate_curve
from vdiff.report.schedules import schedule_comparison as schedule_comparison
from vdiff.report.trajectories import denoising_rows as denoising_rows
from vdiff.report.values import format_seconds as format_seconds
from vdiff.report.values import format_value as format_value

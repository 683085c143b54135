"""The lecture's other families, behind the same law of objectives."""

from vdiff.baselines.ebm import EBM as EBM
from vdiff.baselines.ebm import ebm as ebm
from vdiff.baselines.made import MADE as MADE
from vdiff.baselines.made import made as made
from vdiff.baselines.made import shuffled_orders as shuffled_orders
from vdiff.baselines.made import under_order as under_order
from vdiff.baselines.pixelcnn import PixelCNN as PixelCNN
from vdiff.baselines.pixelcnn import pixelcnn as pixelcnn
from vdiff.baselines.score_matching import curvature_gap as curvature_gap
from vdiff.baselines.score_matching import denoising_score_matching as denoising_score_matching
from vdiff.baselines.score_matching import explicit_score_matching as explicit_score_matching
from vdiff.baselines.score_matching import sliced_score_matching as sliced_score_matching
from vdiff.baselines.score_matching import sliced_score_matching_vr as sliced_score_matching_vr

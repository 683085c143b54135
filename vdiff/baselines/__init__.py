"""The lecture's other families, behind the same law of objectives."""

from vdiff.baselines.contrastive_divergence import contrastive_divergence as contrastive_divergence
from vdiff.baselines.contrastive_divergence import (
    persistent_contrastive_divergence as persistent_contrastive_divergence,
)
from vdiff.baselines.ebm import EBM as EBM
from vdiff.baselines.ebm import ebm as ebm
from vdiff.baselines.log_partition import LogPartition as LogPartition
from vdiff.baselines.log_partition import annealed_log_partition as annealed_log_partition
from vdiff.baselines.log_partition import exact_log_partition as exact_log_partition
from vdiff.baselines.log_partition import normalized_log_prob as normalized_log_prob
from vdiff.baselines.log_partition import reverse_log_partition as reverse_log_partition
from vdiff.baselines.made import MADE as MADE
from vdiff.baselines.made import made as made
from vdiff.baselines.made import shuffled_orders as shuffled_orders
from vdiff.baselines.made import under_order as under_order
from vdiff.baselines.pixelcnn import PixelCNN as PixelCNN
from vdiff.baselines.pixelcnn import pixelcnn as pixelcnn
from vdiff.baselines.rbm import RBM as RBM
from vdiff.baselines.rbm import gibbs as gibbs
from vdiff.baselines.rbm import rbm as rbm
from vdiff.baselines.score_matching import curvature_gap as curvature_gap
from vdiff.baselines.score_matching import denoising_score_matching as denoising_score_matching
from vdiff.baselines.score_matching import explicit_score_matching as explicit_score_matching
from vdiff.baselines.score_matching import sliced_score_matching as sliced_score_matching
from vdiff.baselines.score_matching import sliced_score_matching_vr as sliced_score_matching_vr

"""Networks: the only home of Flax."""

from vdiff.nets.adapters import from_equinox as from_equinox
from vdiff.nets.adapters import from_linen as from_linen
from vdiff.nets.adapters import from_nnx as from_nnx
from vdiff.nets.constant import constant as constant
from vdiff.nets.conv import conv_decoder as conv_decoder
from vdiff.nets.conv import conv_encoder as conv_encoder
from vdiff.nets.dit import dit as dit
from vdiff.nets.gated_pixelcnn import gated_pixelcnn as gated_pixelcnn
from vdiff.nets.ladder import conv_ladder as conv_ladder
from vdiff.nets.masked import masked_mlp as masked_mlp
from vdiff.nets.mlp import mlp as mlp
from vdiff.nets.rematerialized import rematerialized as rematerialized
from vdiff.nets.rematerialized import rematerialized_block as rematerialized_block
from vdiff.nets.time import fourier_features as fourier_features
from vdiff.nets.time_mlp import time_mlp as time_mlp
from vdiff.nets.unet import unet as unet

"""Networks: the only home of Flax."""

from vdiff.nets.adapters import from_equinox as from_equinox
from vdiff.nets.adapters import from_linen as from_linen
from vdiff.nets.adapters import from_nnx as from_nnx
from vdiff.nets.conv import conv_decoder as conv_decoder
from vdiff.nets.conv import conv_encoder as conv_encoder
from vdiff.nets.mlp import mlp as mlp

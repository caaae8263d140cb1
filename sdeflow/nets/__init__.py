"""Small networks for vectors and small images, called as `net(x, lam)` or `net(x, lam, label=label)`.

They read the time as lam = log(alpha/sigma), so a `Model` of one takes `time="lam"`, and its output
is smooth in lam and in x (SiLU, a few harmonics of a bounded function of lam): the order of a solver
can be seen on them. Their `config` holds the constructor's arguments, which is what a checkpoint keeps.
"""

from sdeflow.nets.embedding import time_features
from sdeflow.nets.mlp import MLP
from sdeflow.nets.precondition import EDMPreconditioned
from sdeflow.nets.unet import UNet

__all__ = ["MLP", "EDMPreconditioned", "UNet", "time_features"]

"""Training objectives: one value a sample, unreduced, so that weights are products and means are the caller's.

Every squared error is a mean over the components of a sample, so that the losses of this package have one
scale: `implicit`, `sliced` and `kernel_matching` differ from `denoising` of the score by what no model changes.
"""

from sdeflow.losses import weights
from sdeflow.losses.bound import bound_bits, hybrid, prior_bits, step_bits
from sdeflow.losses.consistency import consistency
from sdeflow.losses.continuous_bound import diffusion_rate, reconstruction_bits
from sdeflow.losses.history import ImportanceTimes, LossHistory, importance_times
from sdeflow.losses.matching import denoising, flow_matching, kernel_matching, kernel_score
from sdeflow.losses.nodes import grid_times
from sdeflow.losses.pixels import discretised_log_likelihood
from sdeflow.losses.progressive import NodeLoss, progressive
from sdeflow.losses.score_matching import implicit, sliced
from sdeflow.losses.times import (
    log_normal_times,
    logit_normal_times,
    offset_times,
    stratified_times,
    uniform_times,
)
from sdeflow.losses.weights import Weight, loss_ratio

__all__ = [
    "denoising",
    "flow_matching",
    "kernel_matching",
    "kernel_score",
    "NodeLoss",
    "progressive",
    "consistency",
    "grid_times",
    "implicit",
    "sliced",
    "Weight",
    "loss_ratio",
    "weights",
    "prior_bits",
    "step_bits",
    "bound_bits",
    "hybrid",
    "diffusion_rate",
    "reconstruction_bits",
    "discretised_log_likelihood",
    "uniform_times",
    "offset_times",
    "stratified_times",
    "log_normal_times",
    "logit_normal_times",
    "importance_times",
    "ImportanceTimes",
    "LossHistory",
]

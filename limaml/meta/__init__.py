"""The meta-learning core: blocks, the engines and solvers that adapt them, and the outer loop."""

from limaml.meta.blocks import CONSTANT, CrossNetwork, FeatureEmbedding, InteractionMLP, MetaMLP
from limaml.meta.build import build_global_block, build_meta_model
from limaml.meta.cut import ConcatMLP
from limaml.meta.gradient import GradientSolver
from limaml.meta.learn import MetaLearner
from limaml.meta.losses import Losses
from limaml.meta.model import MetaModel
from limaml.meta.newton import NewtonSolver
from limaml.meta.outer import Epoch, History, Learner, Progress, fit
from limaml.meta.saved import TrainedModel, load_model, save_model
from limaml.meta.train import Training, train
from limaml.meta.uncertainty import Posterior, calibrate, logit_sd
from limaml.meta.warm import WarmStart, warm_start

__all__ = [
    "CONSTANT",
    "ConcatMLP",
    "CrossNetwork",
    "Epoch",
    "FeatureEmbedding",
    "GradientSolver",
    "History",
    "InteractionMLP",
    "Learner",
    "Losses",
    "MetaLearner",
    "MetaMLP",
    "MetaModel",
    "NewtonSolver",
    "Posterior",
    "Progress",
    "TrainedModel",
    "Training",
    "WarmStart",
    "build_global_block",
    "build_meta_model",
    "calibrate",
    "fit",
    "load_model",
    "logit_sd",
    "save_model",
    "train",
    "warm_start",
]

# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Estimators of the score of a distribution from its samples; torch only, no Pyro."""

from pyro_ardae.score.ardae import ARDAE
from pyro_ardae.score.dae import DAE
from pyro_ardae.score.estimator import ScoreEstimator
from pyro_ardae.score.kde import KernelDensityScore
from pyro_ardae.score.paper import PaperARDAE
from pyro_ardae.score.sliced import SlicedScore
from pyro_ardae.score.spectral import SpectralScore
from pyro_ardae.score.stein import SteinScore

__all__ = [
    "ARDAE",
    "DAE",
    "PaperARDAE",
    "KernelDensityScore",
    "SlicedScore",
    "SpectralScore",
    "SteinScore",
    "ScoreEstimator",
]

# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Estimators of the score of a distribution from its samples; torch only, no Pyro."""

from pyro_ardae.score.ardae import ARDAE
from pyro_ardae.score.dae import DAE
from pyro_ardae.score.estimator import ScoreEstimator
from pyro_ardae.score.paper import PaperARDAE

__all__ = ["ARDAE", "DAE", "PaperARDAE", "ScoreEstimator"]

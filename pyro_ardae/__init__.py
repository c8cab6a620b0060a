# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit guides for Pyro, trained with AR-DAE entropy gradients."""

from pyro_ardae.arviz import to_arviz
from pyro_ardae.autoguide import AutoImplicit
from pyro_ardae.bound import elbo_estimate
from pyro_ardae.diagnostics import stein_check
from pyro_ardae.elbo import (
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from pyro_ardae.implicit import Implicit
from pyro_ardae.likelihood import log_likelihood
from pyro_ardae.score import ARDAE

__all__ = [
    "ARDAE",
    "AutoImplicit",
    "Implicit",
    "TraceImplicitEnum_ELBO",
    "TraceImplicitMeanField_ELBO",
    "TraceImplicit_ELBO",
    "__version__",
    "elbo_estimate",
    "log_likelihood",
    "stein_check",
    "to_arviz",
]

__version__ = "0.1.0"

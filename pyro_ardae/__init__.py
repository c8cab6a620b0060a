# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Implicit guides for Pyro, trained with AR-DAE entropy gradients."""

from pyro_ardae.elbo import (
    TraceImplicit_ELBO,
    TraceImplicitEnum_ELBO,
    TraceImplicitMeanField_ELBO,
)
from pyro_ardae.implicit import Implicit
from pyro_ardae.score import ARDAE

__all__ = [
    "ARDAE",
    "Implicit",
    "TraceImplicitEnum_ELBO",
    "TraceImplicitMeanField_ELBO",
    "TraceImplicit_ELBO",
    "__version__",
]

__version__ = "0.1.0"

# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""An automatic guide without a density, for any Pyro model of continuous latents."""

from pyro_ardae.autoguide.guide import AutoImplicit

__all__ = ["AutoImplicit"]

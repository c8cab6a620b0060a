# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""What the programs share: the run folder, errors that are printed in a line, plots."""

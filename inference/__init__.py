# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""The programs: run each as ``python -m inference.NAME`` from the root of a clone."""

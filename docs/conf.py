# Copyright Contributors to the pyro-ardae project.
# SPDX-License-Identifier: Apache-2.0

"""Configuration of the documentation (``make docs``)."""

import os
from importlib.metadata import version as installed_version

project = "pyro-ardae"
author = "Contributors to the pyro-ardae project"
copyright = author
release = version = installed_version("pyro-ardae")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["_build", "**/.jupyter_cache", "**.ipynb_checkpoints"]

# Docstrings are Pyro's field lists, which autodoc reads as they are; napoleon is not needed.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
add_module_names = False
default_role = "code"

# Links into other projects need their inventories from the network. A build without it would end
# with a warning, hence with an error under `sphinx -W`, so they are opted into where the site is
# published: PYRO_ARDAE_DOCS_ONLINE=1 make docs. Without them such names are plain text.
intersphinx_mapping = {}
if os.environ.get("PYRO_ARDAE_DOCS_ONLINE") == "1":
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
    }

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

html_theme = "furo"
html_title = "pyro-ardae"
html_static_path = ["_static"]

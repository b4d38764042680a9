"""Configuration of the Sphinx documentation."""

import sb3_qsm

project = "sb3-qsm"
author = "The sb3-qsm contributors"
copyright = "2026, the sb3-qsm contributors"
release = version = sb3_qsm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
myst_enable_extensions = ["amsmath", "dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

# The types stand in the signature; the parameters' descriptions come from the docstrings.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# One line for each parameter, so that a long signature can be read.
maximum_signature_line_length = 100

copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"sb3-qsm {release}"

"""How the documentation is built: ``make docs``."""

from __future__ import annotations

import eplb

project = "eplb-toolkit"
project_copyright = "the eplb-toolkit authors, Apache-2.0"
release = version = eplb.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["pictures"]

# Anchors of headings as GitHub makes them, so that links work in both places.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
# What only engines or GPUs have.
autodoc_mock_imports = ["sglang", "triton", "vllm"]

html_theme = "furo"
html_title = "eplb-toolkit"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f2", "color-brand-content": "#7db8f2"},
}

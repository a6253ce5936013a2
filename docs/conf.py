"""How Sphinx builds these pages: MyST Markdown, warnings are errors (`make docs`)."""

project = "thinkgate"
author = "the thinkgate authors"
copyright = "the thinkgate authors, Apache-2.0"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
root_doc = "index"
myst_heading_anchors = 3
html_theme = "alabaster"
html_theme_options = {"description": "Thinking on a budget, in front of vLLM", "page_width": "1000px"}
html_show_sphinx = False
html_show_copyright = False

"""The site that `make docs` builds with Sphinx: the repository's Markdown as it is, and a reference in docs/api.md.

The source folder is the repository's root, so links between documents, and to examples and modules, lead to the same
files as on GitHub. A comment `<!-- api: mlx_aimv2.load -->`, which GitHub does not show, becomes the signature and the
docstring of that function or class.
"""

import importlib
import inspect
import re
import shutil
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path

from mlx_aimv2 import __version__
from mlx_aimv2.train.settings import flagged

project = "mlx_aimv2"
html_title = f"mlx_aimv2 {__version__}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "*/README.md", "benchmarks/results/*.md", "tests/mutations/README.md"]
include_patterns += ["mlx_aimv2/assets/CREDITS.md"]
exclude_patterns = [".*", "build", "dist", "site"]

SIDEBAR = {
    "Build on it": ["docs/cookbook", "docs/api", "docs/models", "examples/README"],
    "Use it": [f"docs/{name}" for name in ("searching", "server", "learning", "converting", "apps", "pretraining")],
    "Run it": ["docs/several-macs", "docs/benchmarks", "benchmarks/README"],
}
"""Caption -> pages below it; all others are below "More"."""

myst_heading_anchors = 4  # as GitHub's
highlight_language = "text"
smartquotes = False

default_role = "py:obj"  # in docstrings `name` is code, and a link where the site knows the name
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
autodoc_preserve_defaults = True
autoclass_content = "both"  # __init__ says what it raises
autodoc_default_options = {"members": True, "special-members": "__call__", "member-order": "bysource"}
toc_object_entries = False

html_theme = "furo"
html_static_path = html_css_files = ["site.css"]
html_copy_source = html_show_copyright = html_use_index = False


def pages(found):
    """The hidden tables of contents that the sidebar is made of, in MyST."""
    others = found - {root_doc, *chain(*SIDEBAR.values())}
    for title, names in {**SIDEBAR, "More": sorted(others)}.items():
        lines = "\n".join(f"/{name}" for name in names)
        yield f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{lines}\n```"


def directive(name):
    """autodoc's directive for a public name, in MyST."""
    module, _, attribute = name.rpartition(".")
    kind = "class" if inspect.isclass(getattr(importlib.import_module(module), attribute)) else "function"
    return f"```{{eval-rst}}\n.. auto{kind}:: {name}\n```"


def read(app, page, content):
    content[0] = re.sub(r"^<!-- api: (\S+) -->$", lambda match: directive(match[1]), content[0], flags=re.MULTILINE)
    if page == root_doc:
        content[0] += "".join(pages(app.env.found_docs))


def settings(app, what, name, thing, options, lines):
    """Adds what the fields of a run's settings are for, as the command line's help says it of their flags."""
    for one in flagged(thing) if is_dataclass(thing) else ():
        lines.append(f"- `{one.name}{'=False' if one.default is True else ''}`: {one.metadata['help']}")


def finish(app, error):
    if error is None:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app):
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", settings)
    app.connect("build-finished", finish)

"""Sphinx configuration of the documentation. `make docs` builds it with every warning an error."""

import dataclasses
import io
import json
import re
import textwrap
import tomllib
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import get_type_hints
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole
from sphinx.util.typing import stringify_annotation

import mini_ddpm
import mini_ddpm_cli

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NOTEBOOK = ROOT / "examples" / "ddpm_from_scratch.ipynb"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

project = "mini-ddpm"
author = "the mini-ddpm authors"
copyright = author
version = release = mini_ddpm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # docstrings write `name` as Markdown does

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_title = f"{project} {version}"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
pygments_style = "friendly"

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is shown with the outputs stored in it

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

linkcheck_timeout = 30
linkcheck_retries = 3
linkcheck_anchors = False
linkcheck_ignore = [r"http://127\.0\.0\.1", re.escape(REPOSITORY)]  # `repo` checks these

LOGGER = logging.getLogger(__name__)
MATHML = "{http://www.w3.org/1998/Math/MathML}"
ElementTree.register_namespace("", MATHML.strip("{}"))


class RepositoryRole(SphinxRole):
    """{repo}`path` or {repo}`text <path>`: a link to a file or folder of the repository, which must exist here."""

    def run(self):
        """Return the link."""
        text, path = re.fullmatch(r"(.*?)(?: <(.*)>)?", self.text, re.DOTALL).groups()
        path = path or text
        if not (ROOT / path).exists():
            LOGGER.warning("the repository has no %s", path, location=self.get_location())
        literal = nodes.literal(text, text)
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return [nodes.reference("", "", literal, refuri=f"{REPOSITORY}/{kind}/main/{path}")], []


class CommandHelp(SphinxDirective):
    """{command-help} `NAME` shows what `mini-ddpm NAME --help` prints."""

    required_arguments = 1

    def run(self):
        """Return the text as a literal block."""
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):
            mini_ddpm_cli.main([self.arguments[0], "--help"])
        lines = [textwrap.fill(line, 88, drop_whitespace=False) for line in text.getvalue().splitlines()]
        if not lines:
            raise self.error(f"mini-ddpm {self.arguments[0]} --help printed nothing.")
        return [nodes.literal_block(text="\n".join(lines), language="text")]


def mathml(writer, node):
    """Write a formula as MathML, which browsers draw by themselves: no script, no network."""
    is_block = isinstance(node, nodes.math_block)
    try:
        root = ElementTree.fromstring(tex2mathml(node.astext(), as_block=is_block))
    except MathError as error:
        LOGGER.warning("the formula %s cannot be drawn: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    for both in root.iter(f"{MATHML}munderover"):  # docutils writes the index of a letter with an accent below it
        base, index, accent = both
        if accent.text in "ˉˆ˜":
            letter = ElementTree.Element(f"{MATHML}mover", accent="true")
            letter.extend([base, accent])
            both.tag, both[:] = f"{MATHML}msub", [letter, index]
    formula = ElementTree.tostring(root, encoding="unicode")
    writer.body.append(f'<div class="formula">{formula}</div>\n' if is_block else formula)
    raise nodes.SkipNode


def before_napoleon(app, what, name, obj, options, lines):
    """Keep the text of an attribute: napoleon takes what is before a colon in it for a type."""
    if what in ("attribute", "property", "data"):
        app.env.temp_data[f"docstring of {name}"] = list(lines)


def after_napoleon(app, what, name, obj, options, lines):
    """Describe the fields of settings, and make links of [`Name`] and of Markdown's [text](address)."""
    text = "\n".join(app.env.temp_data.pop(f"docstring of {name}", lines))
    text = re.sub(r"\[([^\]`]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", text)
    for linked in set(re.findall(r"\[`([\w.]+)`\]", text)):
        is_public = linked.partition(".")[0] in mini_ddpm.__all__
        text = text.replace(
            f"[`{linked}`]", f":py:obj:`{linked} <mini_ddpm.{linked}>`" if is_public else f"`{linked}`"
        )
    lines[:] = text.split("\n")
    if what == "class" and obj.__name__.endswith("Config"):
        hints = get_type_hints(obj)  # without what the command line adds to them
        comments = {}
        for base in obj.__mro__[-2::-1]:
            comments |= {field: lines for (owner, field), lines in attribute_comments(base) if owner == base.__name__}
        for field in dataclasses.fields(obj):
            lines += [
                f".. py:attribute:: {field.name}",
                f"   :type: {stringify_annotation(hints[field.name], 'smart')}",
            ]
            if field.default is not dataclasses.MISSING:
                value = str(field.default) if isinstance(field.default, Path) else field.default
                lines += [f"   :value: {value!r}"]
            lines += ["", *(f"   {line}" for line in comments[field.name]), ""]


def attribute_comments(owner):
    """Return the strings below the attributes of a class, by the names of the class and the attribute."""
    return ModuleAnalyzer.for_module(owner.__module__).find_attr_docs().items()


def copy_notebook():
    """Copy the notebook into the sources of the site. Its links to files become links of the site or repository."""

    def link(match):
        target, mark, anchor = match[1].partition("#")
        path = (NOTEBOOK.parent / target).resolve()
        if path.is_relative_to(DOCS):
            return f"]({path.relative_to(DOCS).as_posix()}{mark}{anchor})"
        if not path.exists():
            LOGGER.warning("%s links to %s, which is missing", NOTEBOOK.name, match[1])
        return f"]({REPOSITORY}/blob/main/{path.relative_to(ROOT).as_posix()})"

    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, "".join(cell["source"]))
    (DOCS / "notebook.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def setup(app: Sphinx):
    """Register what this file defines. Sphinx calls it."""
    copy_notebook()
    app.add_role("repo", RepositoryRole())
    app.add_directive("command-help", CommandHelp)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)

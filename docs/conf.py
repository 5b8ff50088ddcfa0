"""The documentation site: `make docs` builds it, into `build/docs`, without a network."""

import posixpath
import re
import sys
import warnings
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger(__name__)
REPOSITORY = "https://github.com/mi-kernels/mi_kernels"
sys.path.append(str(ROOT))  # behind PYTHONPATH and what is installed

import mi_kernels as mi  # noqa: E402

project = "mi_kernels"
author = "The mi_kernels authors"
copyright = f"2026, {author}"
release = version = mi.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["tutorials/GALLERY_HEADER.rst"]
nitpicky = True
# Nothing is looked up in other projects' inventories, as that would take a network.
nitpick_ignore_regex = [(r"py:.*", r"(?!mi_kernels)[\w.*~]+.*"), (r"py:class", r"mi_kernels.*\.ModuleT")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Attributes", "Shape"]  # their text as it is, see `prepare`

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Formulas are full of words that highlighters know, so a block without a language is plain text.
highlight_language = "none"

html_theme = "furo"
html_title = f"mi_kernels {release}"
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
html_copy_source = False
html_baseurl = "https://mi-kernels.github.io/mi_kernels/"
html_extra_path = [str(ROOT / "llms.txt")]  # at the root of the site, where assistants look for it
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples" / "tutorials"),
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "image_scrapers": ("matplotlib",),
    "min_reported_time": 10**9,  # times of this machine say nothing of another
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "within_subsection_order": "FileNameSortKey",
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", message="Matplotlib is currently using agg")

# Pages that are files of the repository outside this folder.
ELSEWHERE = {
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "benchmarks": "benchmarks/README.md",
    "zoo": "examples/zoo/README.md",
}
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)((?:#[^)\s]*)?\))")


def links_from(text: str, file: str) -> str:
    """The text of a file of the repository, with links that work in the site.

    Links between pages stay relative, those to a tutorial's script lead to its page, and what is in the
    repository alone gets its address there.
    """
    own = {path: f"{name}.md" for name, path in ELSEWHERE.items()}

    def address(found: re.Match[str]) -> str:
        start, target, end = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        if path.startswith("docs/") and not path.endswith("/") and (ROOT / path).is_file():
            page = posixpath.dirname(file) if file.startswith("docs/") else "docs"
            return start + posixpath.relpath(path, page) + end
        if path.startswith("examples/tutorials"):
            made = "docs/tutorials/" + (posixpath.basename(path)[:-3] if path.endswith(".py") else "index")
            return start + posixpath.relpath(made, posixpath.dirname(file)) + end
        if path in own and file.count("/") < 2:
            return start + own[path] + end
        if (ROOT / path).exists():
            return f"{start}{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{end}"
        return found.group()  # a link that leads nowhere: Sphinx says so

    return LINK.sub(address, text)


def read_source(app, docname: str, source: list[str]) -> None:
    if docname in ELSEWHERE:
        source[0] = links_from((ROOT / ELSEWHERE[docname]).read_text(), ELSEWHERE[docname])
    elif Path(app.env.doc2path(docname, False)).suffix == ".md":
        source[0] = links_from(source[0], f"docs/{docname}.md")


def find_public_name(app, env, node, contnode):
    """References to classes by the module that defines them lead to the public name."""
    name = node.get("reftarget", "").rpartition(".")[2]
    name = {"Selection": "backend"}.get(name, name)  # the class of what it returns
    for module, names in (("mi_kernels", mi.__all__), ("mi_kernels.nn", mi.nn.__all__)):
        if name in names:
            kind, found = "obj", f"{module}.{name}"
            document = node.get("refdoc", app.config.root_doc)
            return env.get_domain("py").resolve_xref(env, document, app.builder, kind, found, node, contnode)
    return None


def show_math(as_block: bool):
    """A visitor that writes MathML, which browsers show without a script from elsewhere."""

    def visit(translator, node) -> None:
        text = re.sub(r"\\[Bb]igg?[lr]?(?![A-Za-z])", "", node.astext())  # sizes of brackets
        if as_block and (r"\\" in text or "&" in text):
            text = rf"\begin{{aligned}}{text}\end{{aligned}}"
        try:
            translator.body.append(tex2mathml(text, as_block=as_block))
        except MathError as error:
            logger.warning("%s, in the formula %s", error, text, location=node)
        raise nodes.SkipNode

    return visit, None


def link_names(app, doctree) -> None:
    """Names such as `mi.glu` in the text lead to the reference."""
    known = {f"mi.{name}": f"mi_kernels.{name}" for name in mi.__all__ if name != "nn"}
    known |= {f"mi.nn.{name}": f"mi_kernels.nn.{name}" for name in mi.nn.__all__}
    known |= {f"mi.nn.rules.{name}()": f"mi_kernels.nn.rules.{name}" for name in mi.nn.rules.__all__}
    for literal in list(doctree.findall(nodes.literal)):
        target = known.get(literal.astext())
        if target is None or isinstance(literal.parent, nodes.reference | pending_xref | nodes.title):
            continue
        link = pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refdoc=app.env.docname
        )
        literal.replace_self(link)
        link += literal


def prepare(app, what, name, thing, options, lines: list[str]) -> None:
    """What napoleon does not read as it is meant.

    Names of several arguments on two lines, ``a, b,`` and ``c: what they are``, come on one; and attributes,
    of which several may share a text, become a list.
    """
    for index in range(len(lines) - 2, -1, -1):
        if re.fullmatch(r"\s+[\w, ]+,", lines[index]) and re.match(r"\s+[\w, ]+: ", lines[index + 1]):
            lines[index] += " " + lines.pop(index + 1).strip()
    if "Attributes:" in lines:
        index = lines.index("Attributes:") + 1
        while index < len(lines) and lines[index].startswith("    "):
            names, colon, text = lines[index].strip().partition(": ")
            deeper = lines[index].startswith("     ")
            lines[index] = f"      {lines[index].strip()}" if deeper else f"    * ``{names}``{colon}{text}"
            index += 1


def setup(app) -> None:
    app.connect("autodoc-process-docstring", prepare, priority=100)  # before napoleon
    app.connect("source-read", read_source)
    app.connect("doctree-read", link_names)
    app.add_html_math_renderer("mathml", inline_renderers=show_math(False), block_renderers=show_math(True))
    app.connect("missing-reference", find_public_name)

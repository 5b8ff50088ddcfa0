"""The documentation site: `make docs` builds it, into `build/docs`, without a network."""

import os
import posixpath
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/mi-kernels/mi_kernels"
sys.path.insert(0, os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] or str(ROOT))

import mi_kernels as mi  # noqa: E402

project = "mi_kernels"
author = "The mi_kernels authors"
copyright = f"2026, {author}"
release = version = mi.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
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
napoleon_use_ivar = True

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

    Links between pages stay relative, and what is in the repository alone gets its address there.
    """
    own = {path: f"{name}.md" for name, path in ELSEWHERE.items()}

    def address(found: re.Match[str]) -> str:
        start, target, end = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        if path.startswith("docs/") and not path.endswith("/") and (ROOT / path).is_file():
            page = posixpath.dirname(file) if file.startswith("docs/") else "docs"
            return start + posixpath.relpath(path, page) + end
        if path in own and file.count("/") < 2:
            return start + own[path] + end
        if (ROOT / path).exists():
            return f"{start}{REPOSITORY}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{end}"
        return found.group()  # a link that leads nowhere: Sphinx says so

    return LINK.sub(address, text)


def read_source(app, docname: str, source: list[str]) -> None:
    if docname in ELSEWHERE:
        source[0] = links_from((ROOT / ELSEWHERE[docname]).read_text(), ELSEWHERE[docname])
    elif app.env.doc2path(docname, False).endswith(".md"):
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


def join_names(app, what, name, thing, options, lines: list[str]) -> None:
    """Names of several arguments on two lines, ``a, b,`` and ``c: what they are``, as one for napoleon."""
    for index in range(len(lines) - 2, -1, -1):
        if re.fullmatch(r"\s+[\w, ]+,", lines[index]) and re.match(r"\s+[\w, ]+: ", lines[index + 1]):
            lines[index] += " " + lines.pop(index + 1).strip()


def setup(app) -> None:
    app.connect("autodoc-process-docstring", join_names, priority=100)  # before napoleon
    app.connect("source-read", read_source)
    app.connect("missing-reference", find_public_name)

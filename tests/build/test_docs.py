"""The documentation builds, its code runs, and nothing is left out that is public or that a message says."""

import ast
import dataclasses
import doctest
import email
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import messages

import mi_kernels as mi
from mi_kernels import planners
from mi_kernels.ops.plan import Cost

ROOT = Path(__file__).resolve().parents[2]
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY, SITE = PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"]
PAGES = sorted(path for path in DOCS.rglob("*.md") if "tutorials" not in path.relative_to(DOCS).parts)
TUTORIALS = sorted((ROOT / "examples" / "tutorials").glob("plot_*.py"))
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^```(python|pycon)\n(.*?)^```", re.S | re.M)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Those that headings get, in the site as on a forge."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.build
@pytest.mark.subprocess
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sphinx", "furo", "myst_parser", "sphinx_gallery")),
    reason="the packages that build the site are not installed: pip install 'mi_kernels[docs]'",
)
def test_the_site_builds_without_a_warning(tmp_path):
    """A page that no other leads to, a link or a name that leads nowhere: all are warnings.

    The tutorials are run by test_examples.py.
    """
    for name in ("docs", "examples", "benchmarks"):
        kept = shutil.ignore_patterns("__pycache__", "tutorials" if name == "docs" else "results")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=kept)
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "llms.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("studies", "mi_kernels", "csrc", "tests", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-q",
        "-W",
        "--keep-going",
        "-D",
        "plot_gallery=0",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, tmp_path / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "site" / "index.html").read_text()
    assert "Which operation do I need?" in made
    assert "api/functions.html#mi_kernels.interaction" in (tmp_path / "site/genindex.html").read_text()
    shown = (tmp_path / "site" / "changelog.html").read_text()
    assert "Keep a Changelog" in shown  # the file itself, not the page that stands for it


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_between_pages_lead_somewhere(page):
    lost = []
    for target in LINK.findall(CODE.sub("", page.read_text())):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            if target.startswith(REPOSITORY):
                lost += [target] if missing_in_repository(target) else []
            continue
        file = page if not path else Path(os.path.normpath(page.parent / path))
        found = file.exists() and (not anchor or file.suffix != ".md" or anchor in anchors(shown(file)))
        lost += [] if found else [target]
    assert lost == []


def shown(page: Path) -> Path:
    """The file that a page stands for, or the page."""
    found = re.search(r"The site shows \[(.*)\]", page.read_text())
    return ROOT / found[1] if found else page


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_formulas_in_the_text_are_no_markup(page):
    """B*Z*X would be BZX with a letter in italics: it is code."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`|^ {4}.*?$", "", page.read_text(), flags=re.S | re.M)
    assert re.findall(r"\w+\*\w[\w*]*", text) == []


@pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="no checkout")
def test_targets_of_make_are_in_the_makefile():
    """Those that a command names, in a block of code or between backticks."""
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    pages = [
        *PAGES,
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "llms.txt")),
    ]
    named = {}
    for page in pages:
        code = re.findall(r"^```[\s\S]*?^```|^ {4}.*$|`[^`\n]+`|^- make .*$", page.read_text(), re.M)
        named[name_of(page)] = set(re.findall(r"(?<![\w.-])make ([a-z][\w-]*)", "\n".join(code)))
    assert all(named[page] for page in ("README.md", "CONTRIBUTING.md", "llms.txt", "docs/install.md"))
    assert {page: targets - known for page, targets in named.items() if targets - known} == {}


def missing_in_repository(url: str) -> bool:
    found = re.fullmatch(rf"{re.escape(REPOSITORY)}/(?:blob|tree|raw)/main/([^#]*)(?:#.*)?", url)
    if found:
        return not (ROOT / found[1]).exists()
    return url.removeprefix(REPOSITORY) not in ("", "/issues", "/security/advisories/new")


def missing_in_site(url: str) -> bool:
    path, _, anchor = url.removeprefix(SITE).lstrip("/").partition("#")
    page = DOCS / (path.removesuffix(".html") or "index")
    if path.startswith("tutorials/"):
        return page.name != "index" and not (ROOT / "examples/tutorials" / f"{page.name}.py").is_file()
    page = page.with_suffix(".md")
    return not page.is_file() or bool(anchor) and anchor not in anchors(shown(page))


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_of_the_readme_work_outside_of_the_repository(name):
    """On the page of a package index: absolute, of a file in this checkout or of a page of the site."""
    links = LINK.findall((ROOT / name).read_text())
    assert links and [link for link in links if not link.startswith("https://")] == []
    assert [link for link in links if link.startswith(REPOSITORY) and missing_in_repository(link)] == []
    assert [link for link in links if link.startswith(SITE) and missing_in_site(link)] == []


def test_the_readme_is_short_and_its_picture_a_file_of_the_repository():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 95
    assert f"![Time of the best rival by ours, for shapes drawn from a seed]({REPOSITORY}/raw/main/" in text
    assert "make demo " in text and "make test " in text


def test_metadata_name_the_same_addresses_everywhere():
    assert PROJECT["readme"] == "README.md" and PROJECT["authors"] == PROJECT["maintainers"]
    for url in PROJECT["urls"].values():
        assert url == SITE or not missing_in_repository(url)
    citation = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", citation, re.M))
    assert fields["version"] == mi.__version__ and fields["license"] == PROJECT["license"]
    assert (fields["repository-code"], fields["url"], fields["title"]) == (REPOSITORY, SITE, PROJECT["name"])
    assert fields["cff-version"] == "1.2.0" and fields["message"] and "authors:" in citation
    assert "title: Multiplicative Interactions and Where to Find Them" in citation
    conf = (DOCS / "conf.py").read_text()
    assert f'html_baseurl = "{SITE}/"' in conf
    assert f'REPOSITORY = "{REPOSITORY}"' in conf and PROJECT["authors"][0]["name"] in conf


def test_citation_is_yaml_of_the_format():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    (paper,) = found["references"]
    assert paper["type"] == "conference-paper" and paper["year"] == 2020 and len(paper["authors"]) == 9


def test_a_bug_report_asks_for_what_doctor_prints():
    templates = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert [path.stem for path in templates] == ["bug", "feature", "performance"]
    assert "python -m mi_kernels doctor" in templates[0].read_text()
    for path in templates:
        assert re.match(r"---\nname: .+\nabout: .+\nlabels: .+\n---\n", path.read_text())


def public() -> set[str]:
    names = {f"mi_kernels.{name}" for name in mi.__all__ if name not in ("nn", "parallel")}
    names |= {f"mi_kernels.nn.{name}" for name in mi.nn.__all__}
    names |= {f"mi_kernels.parallel.{name}" for name in mi.parallel.__all__}
    return names | {f"mi_kernels.nn.rules.{name}" for name in mi.nn.rules.__all__}


def test_the_reference_has_every_public_name():
    named = set()
    for page in (DOCS / "api").glob("*.md"):
        module = ""
        for line in page.read_text().splitlines():
            if found := re.match(r"\.\. (currentmodule|automodule):: (\S+)", line):
                module = found[2]
            elif found := re.match(r"\.\. (?:auto\w+|data):: (\S+)", line):
                named.add(f"{module}.{found[1]}")
    assert public() - named == set()


def test_every_environment_variable_is_documented():
    files = [ROOT / "setup.py", ROOT / "Makefile", ROOT / "CMakeLists.txt"]
    for folder in ("mi_kernels", "csrc", "tools", "benchmarks", "studies", "tests", "examples"):
        files += [
            path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
        ]
    # Not of what CMake defines for the preprocessor, nor in this sentence of a pattern.
    used = {name for file in files for name in re.findall(r"\bMI_KERNELS_[A-Z_]+[A-Z]\b", file.read_text())}
    assert len(used) > 8
    page = (DOCS / "install.md").read_text()
    assert {name for name in used if f"`{name}`" not in page} == set()
    assert {name for name in re.findall(r"`(MI_KERNELS_\w+)`", page) if name not in used} == set()


def test_troubleshooting_has_every_message():
    patterns = {pattern: messages.compiled(pattern) for pattern in messages.patterns()}
    made = messages.messages()
    assert len(made) > 250
    missing = {
        text: where for text, where in made.items() if not any(p.fullmatch(text) for p in patterns.values())
    }
    assert missing == {}
    assert [text for text, p in patterns.items() if not any(map(p.fullmatch, made))] == []


def test_every_entry_of_troubleshooting_has_a_cure():
    entries = re.split(r"^##+ ", messages.PAGE.read_text(), flags=re.M)
    with_messages = [entry for entry in entries if "```text" in entry]
    assert len(with_messages) > 25
    cures = "Cure:", "in each", "report", "write `with"
    titles = [entry.splitlines()[0] for entry in with_messages if not any(cure in entry for cure in cures)]
    assert titles == []


def test_a_message_is_read_as_it_will_be_printed():
    source = (
        "def f(x):\n"
        "    wrong = f'op: x: expected {x}' + ', got none'\n"
        "    raise ValueError(wrong)\n"
        "sys.exit('no compiler' if x else f'no {x}, either')\n"
        "print('well done')\n"
    )
    found = {text for _, text in messages.in_python(source)}
    assert found == {"op: x: expected …, got none", "no compiler", "no …, either"}
    text = (
        'STD_TORCH_CHECK(a(b, c) && "x", op, ": ", x, ": expected ", n ? "a" : "b", ", got "\n "none, in (");'
    )
    assert [text for _, text in messages.in_cpp(text)] == ["…: …: expected …, got none, in ("]
    assert not messages.compiled("<op>: x: expected <value>").fullmatch("…: x: expected one of …")


def test_explain_describes_every_field_and_algorithm():
    text = (DOCS / "explain.md").read_text()
    fields = [field.name for field in dataclasses.fields(mi.Plan)] + list(Cost._fields)
    assert [name for name in fields if f"`{name}`" not in text] == []
    named = set(re.findall(r"`([\w-]+)`", text[text.index("## The algorithms") :]))
    assert set(planners._WHY) - named == set()


def with_code() -> list[Path]:
    """All but the page whose program is for two processes: tests/ops/test_parallel.py runs it."""
    pages = [ROOT / "README.md", *(page for page in PAGES if page.name != "distributed.md")]
    return [page for page in pages if CODE.search(page.read_text())]


@pytest.mark.tools
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", with_code(), ids=name_of)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in CODE.finditer(text):
        line = text.count("\n", 0, block.start()) + 1
        if block[2].startswith("# skip: "):
            continue
        if block[1] == "python":
            exec(compile("\n" * line + block[2], page, "exec"), names)
            continue
        found = doctest.DocTestParser().get_doctest(block[2], names, page.name, str(page), line)
        report: list[str] = []
        runner = doctest.DocTestRunner()
        assert runner.run(found, out=report.append, clear_globs=False).failed == 0, "".join(report)
        names = found.globs


def test_pictures_show_the_results_in_the_repository():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.harness import ratios

    made = {name: ratios.digest(axis, shown) for name, axis, shown in ratios.contents()}
    assert {path.name for path in ratios.FOLDER.glob("*.png")} == made.keys()
    carried = {name: ratios.digest_in(ratios.FOLDER / name) for name in made}
    assert carried == made, "python benchmarks/harness/ratios.py"
    shown_in = (DOCS / "performance.md").read_text() + (DOCS / "index.md").read_text()
    assert [name for name in made if f"images/{name}" not in shown_in] == []


def test_every_tutorial_begins_with_a_title_and_says_what_it_is():
    assert len(TUTORIALS) >= 5
    for path in TUTORIALS:
        title, rule, *text = ast.get_docstring(ast.parse(path.read_text())).splitlines()
        assert title and set(rule) == {"="} and len(rule) >= len(title) and "".join(text).strip(), path.name
        assert f"(../examples/tutorials/{path.name})" in (DOCS / "index.md").read_text()


@pytest.mark.build
@pytest.mark.subprocess
def test_what_is_built_carries_addresses_authors_and_the_readme(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(
        ROOT / "mi_kernels", tmp_path / "mi_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    build = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_wheel('.'))"
    environment = os.environ | {"MI_KERNELS_SKIP_NATIVE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = email.message_from_string((tmp_path / done.stdout.split()[-1] / "METADATA").read_text())
    assert PROJECT["urls"].keys() == {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}
    assert {f"{name}, {url}" for name, url in PROJECT["urls"].items()} == set(found.get_all("Project-URL"))
    assert found["Author"] == found["Maintainer"] == PROJECT["authors"][0]["name"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()

"""The files of the public CI: their shape, and that what they call is there."""

import re
from pathlib import Path

import pytest

import mi_kernels as mi

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="no checkout")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_make_targets_and_variables_are_there(path):
    makefile = (ROOT / "Makefile").read_text()
    for line in re.findall(r"\bmake (.+)$", "\n".join(commands(path)), re.MULTILINE):
        words = re.sub(r'"[^"]*"|\$\{\{.*?\}\}', "value", line).split()
        targets = [word for word in words if "=" not in word]
        assert targets and set(targets) <= TARGETS, line
        for name in (word.partition("=")[0] for word in words if "=" in word):
            assert re.search(rf"^{name} \?=", makefile, re.MULTILINE) or name == "CXX", line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_have_a_machine_and_steps(path):
    """Without a parser: indentation by two, and the keys of each job."""
    text = path.read_text()
    assert "\t" not in text and re.search(r"^on:$", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert all((len(line) - len(line.lstrip())) % 2 == 0 for line in lines)
    jobs = re.split(r"^  (?=\w[\w-]*:$)", text.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]
    assert jobs
    for job in jobs:
        keys = set(re.findall(r"^    ([\w-]+):", job, re.MULTILINE))
        assert {"runs-on", "steps"} <= keys or "uses" in keys, job
        for step in re.findall(r"^      - (.+)$", job, re.MULTILINE):
            assert re.match(r"(uses|run|if|\{ name): ", step), step


def commands(path: Path) -> list[str]:
    return re.findall(r"^\s+(?:- )?run: (.+)$", path.read_text(), re.MULTILINE)


def test_files_that_they_name_are_there():
    texts = "\n".join(path.read_text() for path in WORKFLOWS)
    named = re.findall(r"(?:run: python|uses:) (?!-m )(\S+)", texts)
    local = [name for name in named if "@" not in name]
    assert local and all((ROOT / name).is_file() for name in local), local


def jobs_of(name: str) -> dict[str, str]:
    text = (ROOT / ".github" / "workflows" / name).read_text().partition("\njobs:\n")[2]
    return dict(re.findall(r"^  (\w[\w-]*):\n((?:(?:    .*| *#.*)?\n)+)", text, re.MULTILINE))


def test_actions_are_those_of_the_host_alone():
    """By their major version; another's would run with the rights of the job."""
    used = re.findall(r"uses: ([\w-]+)/[\w.-]+@(\S+)", "\n".join(path.read_text() for path in WORKFLOWS))
    assert used
    for owner, version in used:
        assert owner == "actions" and re.fullmatch(r"v\d+", version), (owner, version)


def test_the_matrix_waits_for_no_other_wheel():
    jobs = jobs_of("tests.yml")
    assert re.findall(r"needs: (.+)", jobs["matrix"]) == ["wheel"]
    assert "needs:" not in jobs["wheel"] and "uses: ./" not in jobs["wheel"]
    assert re.findall(r"run: (make .+)", jobs["wheel"]) == ["make wheel CXX=g++-12"]
    (made,) = re.findall(r"upload-artifact\S+\n +with:\n +name: (\S+)", jobs["wheel"])
    assert re.findall(r"download-artifact\S+\n +with:\n +name: (\S+)", jobs["matrix"]) == [made]
    # A release runs both files, and a run has one artifact of a name.
    assert made not in (ROOT / ".github" / "workflows" / "wheels.yml").read_text()


def test_only_the_jobs_that_publish_may_write():
    for path in WORKFLOWS:
        assert re.search(r"^permissions:\n  contents: read\n\n", path.read_text(), re.MULTILINE), path.name
        for name, job in jobs_of(path.name).items():
            assert (": write" in job) == (name == "publish"), (path.name, name)


def test_the_site_is_published_from_main():
    jobs = jobs_of("docs.yml")
    assert "run: make docs" in jobs["build"] and "path: build/docs\n" in jobs["build"]
    assert "if: github.ref == 'refs/heads/main' && github.event_name != 'pull_request'" in jobs["publish"]
    assert "needs: build" in jobs["publish"] and "name: github-pages" in jobs["publish"]
    assert {"pages", "id-token"} == set(re.findall(r"([\w-]+): write", jobs["publish"]))
    order = [jobs["publish"].index(name) for name in ("configure-pages@", "deploy-pages@")]
    assert "upload-pages-artifact@" in jobs["build"] and order == sorted(order)


def test_a_tag_publishes_what_was_tested_without_a_kept_secret():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = jobs_of("release.yml")
    assert 'tags: ["v*"]' in text and "secrets." not in text and "password" not in text
    assert "needs: [tests, wheels]" in jobs["publish"] and "environment:" in jobs["publish"]
    for name in ("tests", "wheels"):
        assert f"uses: ./.github/workflows/{name}.yml" in jobs[name] and "needs: version" in jobs[name]
        assert "\n  workflow_call:\n" in (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    assert mi.__version__ in (ROOT / "mi_kernels" / "_version.py").read_text()
    (line,) = re.findall(r"run: grep -Fx \"(.+)\" mi_kernels/_version.py", jobs["version"])
    line = line.replace("\\", "").replace("${GITHUB_REF_NAME#v}", mi.__version__)
    assert line in (ROOT / "mi_kernels" / "_version.py").read_text().splitlines()
    # The wheels of the index and the source distribution; not the one with CUDA.
    wheels = jobs_of("wheels.yml")
    names = re.findall(r"\{ name: (\S+), arch: \S+, cuda: \"(.*)\" \}", wheels["wheel"])
    assert {name for name, cuda in names if not cuda} == {"wheel-x86_64", "wheel-aarch64"}
    assert [name for name, cuda in names if cuda and name.startswith("wheel-")] == []
    assert re.findall(r"(?:pattern|name): (wheel-\*|sdist)", jobs["publish"]) == ["wheel-*", "sdist"]


def test_the_matrix_has_what_the_package_promises():
    """From the oldest Python and torch of pyproject.toml on; the classifiers name the same Pythons."""
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    torch = re.search(r'"torch>=([\d.]+)"', project)[1]
    axes = dict(re.findall(r"^ +(python|torch): \[(.+)\]$", text, re.MULTILINE))
    assert axes["python"].startswith(f'"{python}"') and axes["torch"].startswith(f'"{torch}.')
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert classified == re.findall(r"[\d.]+", axes["python"])

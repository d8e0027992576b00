"""The packages of a release: what they hold, and that the wheel, installed alone, draws."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mini_ddpm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
RELATIVE_LINK = r"\]\((?![a-z]+:|#)([^)#]+)[^)]*\)"


def files_in(folder):
    """The files in a folder, by name, without what Python and tools leave there."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    made = {"__pycache__", "_build", "notebook.ipynb"}  # the last by `make docs`
    return {path.as_posix() for path in files if not made & set(path.parts)}


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder], cwd=ROOT, check=True)
    (file,) = folder.iterdir()
    assert file.stat().st_size < 25e6
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"mini_ddpm-{mini_ddpm.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that the source distribution builds."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=sdist, check=True)
    (file,) = folder.iterdir()
    assert file.name == f"mini_ddpm-{mini_ddpm.__version__}-py3-none-any.whl" and file.stat().st_size < 25e6
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(wheel[f"mini_ddpm-{mini_ddpm.__version__}.dist-info/METADATA"])


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"mini_ddpm-{mini_ddpm.__version__}.dist-info"
    package = {name for name in wheel if not name.startswith(info)}
    assert package == files_in(ROOT / "src")
    assert {name.removeprefix(f"{info}/") for name in wheel.keys() - package} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE",
    }  # fmt: skip
    assert all(wheel[name] == (ROOT / "src" / name).read_bytes() for name in package)
    assert wheel[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    endings = {Path(name).suffix for name in package}
    assert endings == {".py", ".typed", ".jinja", ".json", ".png", ".safetensors"}
    weights = {name.split("/")[2] for name in package if name.endswith(".safetensors")}
    assert weights == {"mnist", "mnist-class-conditional", "mnist-distilled", "mnist-one-step"}


def test_the_source_distribution_holds_what_its_tests_and_documents_need(sdist):
    for folder in ("src", "tests", "docs", "examples", "benchmarks", "model_card", ".github"):
        assert files_in(ROOT / folder) <= files_in(sdist / folder)
    for document in sdist.glob("*.md"):
        for link in re.findall(RELATIVE_LINK, document.read_text(encoding="utf-8")):
            assert (sdist / link).exists(), f"{document.name}: {link}"
    assert {"Makefile", "constraints.txt", "CITATION.cff", "LICENSE"} <= files_in(sdist)


def test_the_index_shows_a_readme_whose_links_lead_somewhere(metadata):
    text = metadata.get_payload(decode=True).decode()
    here = (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata["Description-Content-Type"] == "text/markdown" and here[:20] in text
    assert re.findall(RELATIVE_LINK, here) and not re.findall(RELATIVE_LINK, text)
    assert not re.findall(r'(?:src|href)="(?![a-z]+:|#)', text), "write pictures and links in Markdown"
    pictures = re.findall(rf"!\[[^]]*\]\({REPOSITORY}/raw/v{mini_ddpm.__version__}/([^)]+)\)", text)
    others = re.findall(rf"\]\({REPOSITORY}/blob/v{mini_ddpm.__version__}/([^)#]+)", text)
    assert pictures and sorted(pictures + others) == sorted(re.findall(RELATIVE_LINK, here))
    assert all((ROOT / path).exists() for path in pictures + others)


def test_the_metadata_promises_what_is_tested(metadata):
    """The workflow of the tests runs the oldest and the newest Python that the metadata names."""
    assert metadata["Version"] == mini_ddpm.__version__ and metadata["License-Expression"] == "Apache-2.0"
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(metadata.get_all("Classifier")), flags=re.M)
    versions.sort(key=lambda version: int(version[2:]))
    assert metadata["Requires-Python"] == f">={versions[0]}"
    assert workflow("tests")["jobs"]["tests"]["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]


def test_the_address_of_the_repository_stands_in_one_file(sdist):
    """It changes in one place. `pyproject.toml` also needs it for the links of the README."""
    home = REPOSITORY.removeprefix("https://")
    for name in files_in(sdist) - {"pyproject.toml", "PKG-INFO"}:
        content = (sdist / name).read_bytes()
        assert home.encode() not in content, name
    addresses = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert len(addresses) > 3 and set(addresses) == {REPOSITORY}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"GITHUB_REF_NAME": "v9.9.9"}, f"The tag is v9.9.9, but the version is {mini_ddpm.__version__}."),
        ({"GITHUB_REPOSITORY": "somebody/fork"}, "This is https://github.com/somebody/fork, but pyproject.toml names"),
    ],
)
def test_a_release_is_refused_from_a_wrong_tag_or_repository(change, message):
    """The first step of the release's workflow that is not one of setting up, run as the workflow runs it."""
    (step,) = (step for step in workflow("release")["jobs"]["build"]["steps"] if step.get("shell") == "python")
    server, name = REPOSITORY.rsplit("/", 2)[0], "/".join(REPOSITORY.rsplit("/", 2)[1:])
    github = {"GITHUB_REF_NAME": f"v{mini_ddpm.__version__}", "GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": name}
    command = [sys.executable, "-c", step["run"]]
    answer = subprocess.run(
        command, cwd=ROOT, env=os.environ | github | change, stderr=subprocess.PIPE, encoding="utf-8", check=False
    )
    assert answer.returncode == bool(message) and answer.stderr.startswith(message or ""), answer.stderr
    assert message or not answer.stderr


def test_only_one_job_may_publish():
    """And it runs nothing but the two actions that fetch the packages and upload them."""
    jobs = {name: job for file in ("tests", "docs", "release") for name, job in workflow(file)["jobs"].items()}
    allowed = {name for name, job in jobs.items() if "id-token" in job["permissions"]}
    assert allowed == {"deploy", "publish"} and jobs["publish"]["environment"]["name"] == "pypi"
    for name in allowed:
        assert not any("run" in step for step in jobs[name]["steps"])
    for name in ("tests", "docs", "release"):
        assert workflow(name)["permissions"] == {}


@pytest.mark.slow
def test_the_tests_run_from_the_source_distribution(sdist):
    environment = os.environ | {"PYTHONPATH": str(sdist / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py"]
    answer = subprocess.run(command, cwd=sdist, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    assert answer.returncode == 0, answer.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.network
def test_a_release_installs_alone_and_draws(sdist, tmp_path):
    """`make release` without the documentation, from the source distribution."""
    command = ["make", "release", "-o", "docs", f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    answer = subprocess.run(command, cwd=sdist, capture_output=True, encoding="utf-8", check=False)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    name = f"mini_ddpm-{mini_ddpm.__version__}"
    assert files_in(sdist / "dist/release") == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}
    assert "PASSED" in answer.stdout and f"dist/release/{name}.tar.gz" in answer.stdout
    for picture, sizes in (("digits.png", (200, 2000)), ("three.png", (28, 28))):
        with Image.open(sdist / "dist/drawn" / picture) as image:
            assert sizes[0] <= image.width <= sizes[1] and min(image.convert("L").getextrema()) == 0
            assert max(image.convert("L").getextrema()) > 250

"""House rules that a reader can count."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bhsd_jax").rglob("*.py"))
LINES, CODE_LINES = 400, 60  # of a file; of a function without docstring, blanks and comments
FORBIDDEN = {"utils", "helpers", "misc", "common_lib"}


def tracked():
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node, text) <= CODE_LINES, f"{path.name}: {node.name}"


def code_lines(node, text):
    """Lines of a function that hold code."""
    body = node.body
    first = body[0]
    if isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant):
        body = body[1:]
    if not body:
        return 0
    lines = text.splitlines()[body[0].lineno - 1 : node.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def test_no_module_is_named_for_nothing():
    assert not [path for path in FILES if path.stem in FORBIDDEN]


def test_packages_export_nothing():
    for path in (ROOT / "bhsd_jax").rglob("__init__.py"):
        nodes = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr | ast.Assign) for node in nodes), path


def test_the_readme_tree_names_every_room():
    readme = (ROOT / "README.md").read_text()
    rooms = [path for path in (ROOT / "bhsd_jax").iterdir() if (path / "__init__.py").is_file()]
    assert not [path.name for path in rooms if f"  {path.name}/ " not in readme]
    assert len(readme.encode()) < 15_000, "for newcomers; the rest has its own place"


def test_no_scan_weight_or_path_of_a_machine_is_tracked():
    names = tracked()
    ends = (".nii", ".nii.gz", ".dcm", ".pth", ".arrayrecord", ".ckpt")
    assert not [name for name in names if name.endswith(ends)]
    big = [n for n in names if (ROOT / n).is_file() and (ROOT / n).stat().st_size > 2**20]
    assert not big


def test_nothing_tells_to_install_the_package_by_its_name():
    """It is on no index: `pip install` of the name brings what a stranger has put there."""
    tells = re.compile(r"install\b[^\n]{0,40}\bbhsd[-_]jax\b(?!-\d)|bhsd[-_]jax\[")
    texts = [n for n in tracked() if n.startswith(("bhsd_jax/", "tools/", "launch/", "README"))]
    assert not [n for n in texts if (ROOT / n).is_file() and tells.search((ROOT / n).read_text())]


def test_no_two_test_files_share_a_name():
    """Folders of tests are no packages: pytest would refuse the second file."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)

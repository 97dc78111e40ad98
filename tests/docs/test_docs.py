"""The documentation tells the truth: names, commands, links, the file tree and the table of settings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import click
import pytest
import typer
from pydantic import BaseModel

from experiments.cli import app
from experiments.options import DEMO
from fedmask.config import RunConfig, TaskConfig, load_config

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedmask", "clients", "server", "experiments")
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")])
LONGEST_MODULE = 350


def packages() -> list[str]:
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        found.append(name)
        found += [m.name for m in pkgutil.walk_packages(package.__path__, f"{name}.") if m.ispkg]
    return found


def modules() -> list[Path]:
    return sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def project_files() -> list[Path]:
    """What belongs to the project: git's list where there is one, else every file of a source archive."""
    listed = None
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed is not None and listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:  # a source archive, no git, or a clone that git does not trust
        ignored = {".venv", "runs", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        found = [path for path in ROOT.rglob("*") if not ignored & set(path.relative_to(ROOT).parts)]
    return sorted(path for path in found if path.is_file())


def sources() -> list[Path]:
    """The project's text files."""
    return [p for p in project_files() if p.suffix not in (".png", ".gz") and p.name != "LICENSE"]


# Names and docstrings ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", packages())
def test_public_names_have_docstrings(name: str) -> None:
    package = importlib.import_module(name)
    assert (package.__doc__ or "").strip(), f"{name} has no docstring"
    for public in getattr(package, "__all__", ()):
        value = getattr(package, public)
        if inspect.isfunction(value) or inspect.isclass(value):
            _check_docstring(f"{name}.{public}", value)


def _check_docstring(where: str, value: type | object) -> None:
    text = (value.__doc__ or "").strip()
    # A dataclass without one gets its signature as docstring.
    assert text and not text.startswith(f"{getattr(value, '__name__', '')}("), f"{where} has no docstring"
    if not inspect.isclass(value):
        return
    for name, member in vars(value).items():
        plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        ours = inspect.isfunction(plain) and str(plain.__module__).split(".")[0] in PACKAGES
        if ours and not name.startswith("_") and name != "forward":
            # getdoc: a method that fulfils a contract has its words from there.
            assert inspect.getdoc(getattr(value, name)), f"{where}.{name} has no docstring"


ARRAYS = re.compile(r"^[^\[]*\b(ndarray|NDArray|Tensor)\b")
# What tells a reader how an array must look: a shape, a type of number, or what its entries are.
SHAPES = re.compile(r"\[[^\]]*\]|\b(u?int|float)\d+\b|\b(scalar|flat|shape|indices|integers)\b")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_functions_say_what_they_do_and_how_arrays_look(path: Path) -> None:
    module = importlib.import_module(dotted(path))
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            _check_docstring(f"{module.__name__}.{name}", value)
            own = [key for key, member in vars(value).items() if inspect.isfunction(member)]
            found = {key: getattr(value, key) for key in own if not key.startswith("_") and key != "forward"}
        else:
            found = {"": value} if inspect.isfunction(value) else {}
        for key, function in found.items():
            words = inspect.getdoc(function) or ""
            assert words, f"{module.__name__}.{name}.{key} has no docstring"
            if any(ARRAYS.match(str(kind)) for kind in function.__annotations__.values()):
                assert SHAPES.search(words), (
                    f"{module.__name__}.{name}.{key} does not say how its arrays look"
                )


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_are_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    assert text.startswith(('"""', 'r"""')), "a module opens with the sentence that says what it is"


def test_nothing_names_the_machine_it_was_written_on() -> None:
    marks = re.compile(
        "(?<![A-Za-z0-9_.~])/(?:" + "|".join(["work", "root", "tmp", "opt", "home"]) + ")/[a-z0-9]"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if marks.search(line)
    ]
    assert found == []


# Commands ----------------------------------------------------------------------------------------


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[str]:
    """Lines ``fedmask ...`` of shell blocks (continued lines joined), and of indented ones."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    return [
        line.split("#")[0].strip() for line in text.splitlines() if re.match(r"(\.venv/bin/)?fedmask ", line)
    ]


# Of flwr and its programs.
OTHERS_OPTIONS = {"--insecure", "--node-config", "--database", "--scale", "--enable-supernode-auth"}
ALL_COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS)
def test_documented_commands_exist(page: str, command: str) -> None:
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    if words[0] != "--help":
        found = group.commands[words[0]]
        rest = [word for word in words[1:] if word != "--help"]
        if rest == words[1:]:
            found.make_context(words[0], rest)  # raises on an option or an argument that is not there


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    """Inline code such as ``fedmask report`` and ``--adapter-lr``."""
    known = typer.main.get_command(app).commands
    options = {name for command in known.values() for option in command.params for name in option.opts}
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for code in re.findall(r"`([^`]+)`", text):
        words = code.split()
        if words[0] == "fedmask" and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in known, code
        if words[0].startswith("--"):
            assert words[0] in options | OTHERS_OPTIONS, code


def test_every_command_is_documented() -> None:
    named = {shlex.split(command)[1] for page, command in ALL_COMMANDS if page == "README.md"}
    assert set(typer.main.get_command(app).commands) <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for block in blocks(page, "sh"):
        for target in re.findall(r"^make ([a-z-]+)", block, re.M):
            assert target in targets


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmask.bundled import bundled_model_path

    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    assert "fedmask.magnitude_mask" in code
    # Where a reader puts a hub name or a folder, the test puts the folder that is at hand.
    code = code.replace('"path/or/hub-name"', repr(str(bundled_model_path())))
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "delta.safetensors").stat().st_size < 250_000


def test_readme_shows_real_output_and_a_command_under_each_result() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!--" not in text, "a part of the README still waits for its text"
    assert any(
        "Report: " in block and "full fine-tuning" in block for block in blocks(ROOT / "README.md", "text")
    )
    results = text.split("## Results")[1].split("\n## ")[0]
    assert "|---" in results
    assert "fedmask run" in results


# Links, tree, settings ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        goal = page.parent / file if file else page
        assert goal.exists(), target
        if anchor:
            assert anchor in _anchors(goal), target


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_file_tree_is_the_real_one() -> None:
    """The tree names every module of the packages, every folder of tests, and every file at the root."""
    (tree,) = blocks(ROOT / "README.md", "text")[-1:]
    named, folder = set(), ""
    for line in tree.splitlines():
        entry, _, said = line.strip().partition(" ")
        assert said.strip(), f"no words for {entry}"
        if not line.startswith(" "):
            folder = ""
        for part in entry.split(","):
            named.add(folder + part)
        if not line.startswith(" ") and entry.endswith("/"):
            folder = entry
    real = set()
    for path in project_files():
        first, *rest = path.relative_to(ROOT).parts
        real.add(first + "/" * bool(rest))
        if first in (*PACKAGES, "tests") and rest != ["__init__.py"]:
            real.add(f"{first}/{rest[0]}" + "/" * (len(rest) > 1))
    assert named - real == set(), "named, but not there"
    assert real - named == set(), "there, but not named"


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Dotted key -> default of every setting, tasks apart."""
    out: dict[str, object] = {}
    for key, field in model.model_fields.items():
        nested = [kind for kind in (field.annotation, *get_args(field.annotation)) if _is_settings(kind)]
        if nested and prefix != "tasks." and key != "tasks":
            out |= settings(nested[0], f"{prefix}{key}.")
        elif key != "tasks":
            out[prefix + key] = None if field.is_required() else field.get_default(call_default_factory=True)
    return out


def _is_settings(kind: object) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def test_every_setting_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| ([^|]*) \|", text, re.M))
    expected = settings(RunConfig) | settings(TaskConfig, "tasks.")
    assert set(rows) == set(expected)
    for key, default in expected.items():
        assert rows[key].strip().strip("`") == _shown(default), key


def test_the_demo_s_own_values_are_said() -> None:
    """What a bare ``fedmask run`` does differently from the defaults, setting by setting."""
    demo = load_config(DEMO).model_dump(exclude={"name", "tasks"})
    default = RunConfig(tasks=(TaskConfig(name="bbc", clients=1),)).model_dump(exclude={"name", "tasks"})
    other = {
        key: value
        for part, values in demo.items()
        for key, value in (
            {f"{part}.{key}": value for key, value in values.items() if default[part][key] != value}
            if isinstance(values, dict)
            else {part: values}
            if default[part] != values
            else {}
        ).items()
    }
    text = " ".join((ROOT / "docs" / "settings.md").read_text(encoding="utf-8").split())
    said = text.split("A bare `fedmask run`")[1].split("`--epochs`")[0]
    assert dict(re.findall(r"`([a-z_.]+) = ([^`]*)`", said)) == {
        key: f"{value}" for key, value in other.items()
    }


def _shown(default: object) -> str:
    if default is None or default in ("", (), {}):
        return "-"
    return str(default).lower() if isinstance(default, bool) else f"{default}"


def test_each_fault_names_a_test_that_exists() -> None:
    """docs/reliability.md: every row of its table ends in the test that shows it."""
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) > 25
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)::(test_\w+)` \|$", row)
        assert named, f"no test in: {row}"
        path, function = named.groups()
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {function}"

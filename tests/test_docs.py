"""What the documents tell people to type: commands, settings, files and links that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from wsss.__main__ import COMMANDS
from wsss.cli import _groups, _known_keys, check_overrides, config_dir, quoted_path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "RESULTS.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
HELP = sorted(config_dir().glob("*.yaml"))
PLACEHOLDER = re.compile(r"<[^<>\s]+>")


def blocks(text: str) -> list[str]:
    """Fenced shell blocks, their continued lines joined and comments gone."""
    found = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    return [re.sub(r"\s+#.*", "", block.replace("\\\n", " ")) for block in found]


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def help_lines(text: str) -> list[str]:
    """Of a command's help: what stands two spaces off explains the command before it."""
    joined = text.replace("\\\n", "\0").splitlines()
    return [re.sub(r"(?<=\S) {2,}\S.*", "", re.sub("\0 *", "", line)) for line in joined]


def commands() -> list[tuple[str, str]]:
    """All that begins with ``wsss <command>``, with the file it is in."""
    lines = [(path.name, line) for path in HELP for line in help_lines(path.read_text())]
    for path in DOCUMENTS:
        text = path.read_text()
        shell = [line for block in blocks(text) for line in block.splitlines()]
        lines += [(path.name, line) for line in (*shell, *spans(text))]
    found = set()
    for name, line in lines:
        if match := re.match(r"(?:python -m wsss\.|wsss )(\w+)( .*)?$", " ".join(line.split())):
            found.add((name, f"{match[1]}{match[2] or ''}"))
    return sorted(found)


COMMAND_LINES = commands()


def test_commands_are_found() -> None:
    assert len(COMMAND_LINES) > 40
    assert {line.split()[0] for _, line in COMMAND_LINES} == set(COMMANDS)


@pytest.mark.parametrize(("where", "line"), COMMAND_LINES)
def test_commands_compose(where: str, line: str) -> None:
    """Their keys and choices exist; what stands in angle brackets, or for dots, is the reader's."""
    command, *given = shlex.split(PLACEHOLDER.sub("x", line))
    if given and re.fullmatch(r"[a-z_]+", given[0]):
        command, *given = given
    settings = [a for a in given if "=" in a and not a.endswith("=...")]
    check_overrides(command, [quoted_path(setting) for setting in settings])


def settings() -> list[tuple[str, str, str]]:
    """Settings in inline code, ``key=value`` of the groups and sections of the configuration."""
    found = set()
    for path in DOCUMENTS:
        for span in spans(path.read_text()):
            for key, value in re.findall(r"(?<![\w.-])([a-z_]+(?:\.[a-z_0-9]+)*)=(\S*)", span):
                if not re.search("<|^[A-Z]$", value):  # which stand for a name
                    found.add((path.name, key, value.strip("\"'")))
    return sorted(found)


def test_settings_exist() -> None:
    """A group's choice is one of its files, a variant one of a sweep's, a dotted key a key."""
    sweeps = [OmegaConf.load(file) for file in (config_dir() / "sweep").glob("*.yaml")]
    groups = _groups() | {
        "variant": [name for sweep in sweeps for name in sweep.get("variants", ())]
    }
    keys = {key for path in HELP for key in _known_keys(path.stem)}
    sections = {key.split(".")[0] for key in keys} | set(groups)
    mentioned = settings()
    assert len(mentioned) > 100
    wrong = []
    for where, key, value in mentioned:
        if key in groups:
            chosen = re.findall(r"[\w-]+", value)
            wrong += [f"{where}: {key}={x}" for x in chosen if x not in groups[key]]
        elif key.split(".")[0] in sections and not key.startswith("backbone.options"):
            wrong += [f"{where}: {key}"] * (key not in keys)
    assert not wrong


def test_links_lead_somewhere() -> None:
    broken = []
    for path in DOCUMENTS:
        targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
        local = [t for t in targets if "://" not in t]
        broken += [f"{path.name}: {t}" for t in local if not (path.parent / t).exists()]
    assert not broken


def test_scripts_and_their_options_exist() -> None:
    """``python benchmarks/NAME.py --option`` in documents."""
    seen = 0
    for path in DOCUMENTS:
        text = path.read_text().replace("\\\n", " ")
        for line in re.findall(r"python (benchmarks/\w+\.py[^`\n#]*)", text):
            script, *rest = line.split()
            source = (ROOT / script).read_text()
            for option in (word for word in rest if word.startswith("--")):
                # In a list of such options without its dashes.
                known = f'"{option}"' in source or f'"{option[2:]}"' in source
                assert known, f"{path.name}: {line}: no {option}"
            seen += 1
    assert seen > 5


def test_the_map_is_true() -> None:
    """Files that the README's map names lie where it says; every module and folder is in it."""
    text = (ROOT / "README.md").read_text().split("## Map")[1].split("```")[1]
    package = ROOT / "src" / "wsss"
    named = set(re.findall(r"[\w/]+", text))
    for path in package.rglob("*.py"):
        module = path.relative_to(package)
        if len(module.parts) == 1 and not module.stem.startswith("_"):
            assert {module.stem, module.name} & named, f"the map lacks {module}"
    for folder in package.iterdir():
        if (folder / "__init__.py").is_file():
            assert f"{folder.name}/" in text, f"the map lacks {folder.name}/"
    for file in re.findall(r"(?<![\w/])(\w+\.py)\b", text):
        assert (package / file).is_file(), f"the map has {file}"

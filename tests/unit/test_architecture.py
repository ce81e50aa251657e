# Copyright: The firebreak.incident contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every file of this collection must be, wherever it is: each line of code in its room."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
PACKAGE = "ansible_collections.firebreak.incident.plugins"
UTILS = f"{PACKAGE}.module_utils"

MODULES = sorted((PLUGINS / "modules").glob("*.py"))
CODE = sorted(PLUGINS.rglob("*.py"))
ROLES = sorted(folder for folder in (ROOT / "roles").iterdir() if folder.is_dir()) if (ROOT / "roles").exists() else []
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))
FRONT_ENDS = {
    "fail_json": "_module.py",
    "exit_json": "_module.py",
    "AnsibleModule": "_module.py",
    "ActionBase": "control.py",
}
CLIENT_FILES = [path for path in CODE if path.parent.name == "module_utils" and "\ndef preload(" in path.read_text()]
IMPURE = {
    *(
        "asyncio",
        "ctypes",
        "getpass",
        "importlib",
        "io",
        "logging",
        "multiprocessing",
        "os",
        "pathlib",
        "platform",
        "random",
    ),
    *(
        "secrets",
        "select",
        "shutil",
        "signal",
        "socket",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
        "urllib",
        "uuid",
    ),
}
IMPURE_BUILTINS = {"open", "print", "input", "eval", "exec", "__import__", "globals", "breakpoint"}
IMPURE_METHODS = {"now", "today", "utcnow", "getenv", "read_text", "write_text", "read_bytes", "write_bytes"}


def relative(paths: list[Path]) -> Any:
    return {"argvalues": paths, "ids": [str(path.relative_to(ROOT)) for path in paths]}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def names_in(node: ast.AST) -> set[str]:
    """Every identifier that is used: names, attributes, arguments and keywords; texts are none."""
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            found.add(one.id)
        elif isinstance(one, ast.Attribute):
            found.add(one.attr)
        elif isinstance(one, (ast.arg, ast.keyword)) and one.arg:
            found.add(one.arg)
        elif isinstance(one, ast.alias):
            found.add(one.asname or one.name)
    return found


def documents(path: Path) -> dict[str, str]:
    """The texts DOCUMENTATION, EXAMPLES and RETURN of a module."""
    return {
        node.targets[0].id: node.value.value
        for node in tree(path).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }


def control_of(path: Path) -> Any:
    return importlib.import_module(f"{PACKAGE}.modules.{path.stem}").CONTROL


def changes_something(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "plan" for node in tree(path).body)


CONTROLS = [path for path in MODULES if changes_something(path)]


def test_the_guards_look_at_something() -> None:
    assert MODULES and CONTROLS and CLIENT_FILES and PLAYBOOKS and ROLES


# A control: its module, its binding, its row, its groups


@pytest.mark.parametrize("path", **relative(CONTROLS))
def test_a_control_is_read_plan_apply_main(path: Path) -> None:
    functions = {node.name: node for node in tree(path).body if isinstance(node, ast.FunctionDef)}
    spine = [name for name in functions if name in ("read", "plan", "apply", "main")]
    assert spine == ["read", "plan", "apply", "main"]
    arguments = {name: [one.arg for one in node.args.args] for name, node in functions.items()}
    assert arguments["read"] == ["client", "params"]
    assert arguments["plan"] == ["params", "facts"]
    assert arguments["apply"] == ["client", "params", "change"]
    if "prove" in functions:
        assert arguments["prove"] == ["client", "params", "change"]


@pytest.mark.parametrize("path", **relative(MODULES))
def test_main_is_one_line(path: Path) -> None:
    main = next(node for node in tree(path).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [ast.unparse(statement) for statement in main.body] == ["run_module(CONTROL)"]


@pytest.mark.parametrize("path", **relative(MODULES))
def test_a_module_has_a_binding_of_its_name(path: Path) -> None:
    binding = (PLUGINS / "action" / path.name).read_text()
    assert f"{PACKAGE}.modules.{path.stem} import CONTROL" in binding
    assert control_of(path).name == path.stem


def test_no_binding_is_left_over() -> None:
    assert {path.name for path in (PLUGINS / "action").glob("*.py")} == {path.name for path in MODULES}


@pytest.mark.parametrize("path", **relative(CONTROLS))
def test_a_control_has_a_row(path: Path) -> None:
    row = importlib.import_module(f"tests.controls.{path.stem}")
    assert row.PLANS, "the table of its plan is empty"
    assert row.Lab.control == path.stem


def test_action_groups() -> None:
    groups = yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["action_groups"]
    names = {path.stem for path in MODULES}
    assert set(groups["all"]) == names
    assert set().union(*groups.values()) == names
    for path in CONTROLS:
        service = control_of(path).service.__name__.rpartition("._")[2]
        assert service not in groups or path.stem in groups[service], f"{path.stem} is not in the group {service}"


# plan is pure, and only the engine knows how a run goes


class Reachable:
    """Everything that a function can reach by name: in its file, and in our files that it imports from."""

    def __init__(self, path: Path, name: str) -> None:
        self.faults: set[str] = set()
        self._seen: set[tuple[Path, str]] = set()
        self._follow(path, name)

    def _follow(self, path: Path, name: str) -> None:
        if (path, name) in self._seen:
            return
        self._seen.add((path, name))
        top = tree(path)
        definition = next((node for node in top.body if self._defines(node, name)), None)
        if definition is None:
            return
        imported = dict(self._imports(top))
        where = f"{path.name}: {name}"
        for node in ast.walk(definition):
            if isinstance(node, ast.Attribute) and node.attr in IMPURE_METHODS:
                self.faults.add(f"{where} uses .{node.attr}")
            elif isinstance(node, (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Await)):
                self.faults.add(f"{where} has {type(node).__name__}")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self._name(path, where, node.id, imported)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                self._ours(where, *imported[node.value.id], node.attr)

    def _name(self, path: Path, where: str, name: str, imported: dict[str, tuple[str, str]]) -> None:
        if name in IMPURE_BUILTINS and hasattr(builtins, name):
            self.faults.add(f"{where} uses {name}()")
        elif name not in imported:
            self._follow(path, name)
        elif imported[name][0].partition(".")[0] in IMPURE:
            self.faults.add(f"{where} uses {imported[name][0]}")
        else:
            self._ours(where, *imported[name])

    def _ours(self, where: str, module: str, name: str, attribute: str = "") -> None:
        """``name`` of ``module`` is one of our files, of which ``attribute`` is used, or something in one of our files."""
        if not module.startswith(PACKAGE):
            return
        folder = PLUGINS.joinpath(*module.removeprefix(PACKAGE).strip(".").split("."))
        if folder.with_suffix(".py").exists():
            self._follow(folder.with_suffix(".py"), name)
        elif (folder / f"{name}.py") in CLIENT_FILES:
            self.faults.add(f"{where} uses the client file {name}")
        elif attribute:
            self._follow(folder / f"{name}.py", attribute)

    @staticmethod
    def _defines(node: ast.stmt, name: str) -> bool:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return node.name == name
        if isinstance(node, ast.Assign):
            return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name

    @staticmethod
    def _imports(top: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        for node in top.body:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], (alias.name, "")
            elif isinstance(node, ast.ImportFrom):
                module = f"{UTILS}.{node.module}" if node.level and node.module else (node.module or UTILS)
                for alias in node.names:
                    yield alias.asname or alias.name, (module, alias.name)


@pytest.mark.parametrize("path", **relative(CONTROLS))
def test_plan_is_pure(path: Path) -> None:
    assert Reachable(path, "plan").faults == set()


IMPURITIES = [
    "_proof.answers_with(1)",
    "os.getenv('X')",
    "datetime.datetime.now()",
    "_redis.connect(params, None)",
    "open('x')",
    "helper()",
]


@pytest.mark.parametrize("call", IMPURITIES)
def test_an_impure_plan_is_found(tmp_path: Path, call: str) -> None:
    path = tmp_path / "impure.py"
    path.write_text(
        f"import datetime\nimport os\nimport time\nfrom {UTILS} import _proof, _redis\n\n"
        f"def helper():\n    return time.time()\n\ndef plan(params, facts):\n    return {call}\n"
    )
    assert Reachable(path, "plan").faults


@pytest.mark.parametrize("path", **relative(CODE))
def test_only_the_front_ends_know_ansibles_classes(path: Path) -> None:
    assert {name for name in names_in(tree(path)) & set(FRONT_ENDS) if FRONT_ENDS[name] != path.name} == set()


@pytest.mark.parametrize("path", **relative(CONTROLS))
def test_no_control_knows_check_mode_diff_or_the_journal(path: Path) -> None:
    words = {
        "check_mode",
        "diff_mode",
        "_ansible_check_mode",
        "_ansible_diff",
        "diff",
        "journal",
        "Case",
        "Stream",
        "open_store",
    }
    modules = {"_action", "_case", "_decision", "_engine", "_journal", "_release", "_store", "_task"}
    assert names_in(tree(path)) & (words | modules) == set()


@pytest.mark.parametrize("path", **relative([path for path in CLIENT_FILES if path.name != "_case.py"]))
def test_no_client_file_knows_check_mode_or_diff(path: Path) -> None:
    assert names_in(tree(path)) & {"check_mode", "diff_mode", "diff"} == set()


# Code


@pytest.mark.parametrize("path", **relative(CODE))
def test_third_party_imports_stand_in_functions(path: Path) -> None:
    foreign = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            foreign |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            foreign.add(str(node.module).partition(".")[0])
    assert foreign - set(sys.stdlib_module_names) - {"ansible", "ansible_collections"} == set()


@pytest.mark.parametrize("path", **relative(CODE))
def test_plain_code(path: Path) -> None:
    top = tree(path)
    faults = [
        *(
            f"line {node.lineno}: tuple assignment"
            for node in top.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
        ),
        *(f"line {node.lineno}: assert" for node in ast.walk(top) if isinstance(node, ast.Assert)),
        *(
            f"line {node.lineno}: bare except"
            for node in ast.walk(top)
            if isinstance(node, ast.ExceptHandler) and node.type is None
        ),
    ]
    for node in ast.walk(top):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit", "urlopen"):
            faults.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
    assert faults == []


@pytest.mark.parametrize("path", **relative(CODE))
def test_from_future_annotations(path: Path) -> None:
    imports = (node for node in tree(path).body if isinstance(node, ast.ImportFrom))
    assert any(node.module == "__future__" for node in imports)


@pytest.mark.parametrize("path", **relative(sorted((PLUGINS / "module_utils").glob("*.py"))))
def test_module_utils_are_private(path: Path) -> None:
    assert path.name.startswith("_")
    assert "PRIVATE to this collection" in path.read_text().partition('"""')[0]


def test_lower_bounds_agree() -> None:
    asked = {}
    for path in CODE:
        for _name, distribution, minimum in re.findall(
            r'require\(\s*"([^"]+)",\s*"([^"]+)",\s*"([^"]+)"', path.read_text()
        ):
            assert asked.setdefault(distribution, minimum) == minimum, f"{path.name} asks for another {distribution}"
    bound = re.compile(r"^([\w.-]+)(?:\[\w+\])? >= ([\d.]+)$", re.MULTILINE)
    assert dict(bound.findall((ROOT / "meta/ee-requirements.txt").read_text())) == asked
    for path in sorted((PLUGINS / "doc_fragments").glob("*.py")):
        for distribution, minimum in re.findall(
            r"^\s+- ([\w.-]+)(?:\[\w+\])? >= ([\d.]+)", path.read_text(), re.MULTILINE
        ):
            assert asked.get(distribution) == minimum, f"{path.name} names another {distribution}"


# Documentation of modules


@pytest.mark.parametrize("path", **relative(MODULES))
def test_documentation(path: Path) -> None:
    document = yaml.safe_load(documents(path)["DOCUMENTATION"])
    fragments = document["extends_documentation_fragment"]
    assert document["module"] == path.stem
    assert document["version_added"]
    assert "firebreak.incident.attributes" in fragments
    choices = document.get("options", {}).get("state", {}).get("choices", [])
    assert not {"get", "list", "query"} & set(choices), "readers are _info modules"


@pytest.mark.parametrize("path", **relative(MODULES))
def test_examples(path: Path) -> None:
    tasks = yaml.safe_load(documents(path)["EXAMPLES"])
    for task in tasks:
        assert task["name"][0].isupper()
        assert any(key.count(".") >= 2 for key in task), "modules are named in full"
    assert any(f"firebreak.incident.{path.stem}" in task for task in tasks)


@pytest.mark.parametrize("path", **relative(MODULES))
def test_readers_end_in_info(path: Path) -> None:
    assert (type(control_of(path)).__name__ == "Info") == path.stem.endswith("_info")


# Roles and playbooks


@pytest.mark.parametrize("role", **relative(ROLES))
def test_role(role: Path) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", role.name)
    readme = (role / "README.md").read_text().lower()
    told = ("outcome", "inputs?|variables?", "undo|roll[ -]?back|way back", "idempotent", "atomic")
    assert [words for words in told if not re.search(words, readme)] == []
    assert yaml.safe_load((role / "meta/main.yml").read_text())["galaxy_info"]["description"]
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    assert "main" in specs
    assert [name for name in specs if not (role / f"tasks/{name}.yml").exists()] == []


@pytest.mark.parametrize("role", **relative(ROLES))
def test_defaults_of_a_role_are_those_of_its_specs(role: Path) -> None:
    specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    options = {name: option for spec in specs.values() for name, option in (spec.get("options") or {}).items()}
    file = role / "defaults/main.yml"
    given = (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}
    assert set(given) <= set(options)
    documented = {
        name: option["default"]
        for name, option in options.items()
        if "default" in option and name.startswith(role.name)
    }
    assert documented == {name: given.get(name) for name in documented}
    assert [name for name in given if name not in documented and "{{" not in str(given[name])] == []


def test_nothing_beside_playbooks() -> None:
    assert not (ROOT / "playbooks/roles").exists()
    folders = {path.name for path in (ROOT / "playbooks").iterdir() if path.is_dir()}
    assert folders <= {"files", "vars", "templates", "tasks"}


@pytest.mark.parametrize("path", **relative(PLAYBOOKS))
def test_playbook_is_called_by_its_name(path: Path) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", path.stem)
    command = [
        str(Path(sys.executable).parent / "ansible-playbook"),
        "-i",
        str(ROOT / "inventory/lab.yml"),
        "--syntax-check",
        f"firebreak.incident.{path.stem}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


# The project


def test_what_a_project_has() -> None:
    names = ("README.md", "LICENSE", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSES/GPL-3.0-or-later.txt")
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_execution_environment() -> None:
    definition = yaml.safe_load((ROOT / "meta/execution-environment.yml").read_text())
    assert definition["version"] == 1
    assert [name for name in definition["dependencies"].values() if not (ROOT / name).exists()] == []


def test_no_ignore_files() -> None:
    assert list((ROOT / "tests").glob("sanity/ignore*")) == []
    assert not (ROOT / ".ansible-lint-ignore").exists()


def test_no_machine_is_named() -> None:
    """Neither where it was written, nor where its packages came from."""
    words = ("work/", "root/", "home/", "Users/", "opt/wheels")
    hosts = ("pypi" + ".org", "python" + "hosted.org", "proxy." + "golang.org", "registry." + "npmjs")
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-coz", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    pattern = re.compile(rf"(?<![\w.}}/-])/(?:{'|'.join(words)})|{'|'.join(map(re.escape, hosts))}")
    faults = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            lines = path.read_text("utf-8", "replace").splitlines()
            faults += [
                f"{name}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1) if pattern.search(line)
            ]
    assert faults == []


@pytest.mark.parametrize("name", ["cloudflare", "pgbouncer", "postgresql", "redis", "vault"])
def test_playbooks_hand_over_every_option_of_a_service(name: str) -> None:
    """A connection option that a playbook does not feed from its firebreak_ variable could never be set in an incident."""
    service = importlib.import_module(f"ansible_collections.firebreak.incident.plugins.module_utils._{name}")
    for playbook in (path for path in PLAYBOOKS if f"group/firebreak.incident.{name}" in path.read_text()):
        plays = yaml.safe_load(playbook.read_text())
        given = plays[0]["module_defaults"][f"group/firebreak.incident.{name}"]
        assert set(given) == set(service.SPEC), playbook

"""The house rules, read from the source: who imports whom, what is used where, sizes, docstrings, the README's tree.

Every checker is a function of source text that returns its complaints; each has a twin, a small source that breaks the
rule, so that a checker that sees nothing cannot pass.
"""

import ast
import builtins
import dis
import re
import runpy
import subprocess
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stackwise_jax.config import resolve
from stackwise_jax.errors import UserError
from stackwise_jax.models import families
from stackwise_jax.train.describe import describe
from stackwise_jax.train.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "stackwise_jax").rglob("*.py"))
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*.py"))
TESTS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("*.py"))

# What each part may import of the package, besides itself. Parts that are not listed stand above training (programs,
# evaluations, generation, benchmarks): they may import anything, and because no list names them, nothing below does.
BASE = {"types", "errors", "schema", "config", "checks", ""}
MAY_IMPORT: dict[str, set[str]] = {name: set() for name in ("", "types", "errors", "schema")} | {
    "checks": {"errors", "schema"},
    "config": {"checks", "errors", "schema"},
    "ops": BASE,
    "models": BASE | {"ops"},
    "objectives": BASE | {"ops", "models"},
    "memory": BASE | {"ops", "models"},
    "data": BASE,
    "train": BASE | {"ops", "models", "objectives", "memory", "data"},
}
# Packages that one part alone may import; a folder ends in a slash.
AT_HOME = {
    "flax": ("stackwise_jax/models/",),
    "ml_collections": ("stackwise_jax/config.py", "stackwise_jax/main.py"),
    "orbax": ("stackwise_jax/train/checkpoint.py",),
}
MAX_LINES = 400


def part_of(module: str) -> str:
    """stackwise_jax.train.step -> train; stackwise_jax -> ''."""
    return [*module.split("."), ""][1]


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import anywhere in a file; of `from stackwise_jax import x`, stackwise_jax.x."""
    package = module_of(path).split(".") if path.endswith("__init__.py") else module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "stackwise_jax":
                named = [alias.name for alias in node.names]
                yield from ((node.lineno, module if n.startswith("__") else f"{module}.{n}") for n in named)
            else:
                yield node.lineno, module


def wrong_directions(path: str, source: str) -> list[str]:
    """Imports that point up."""
    own = part_of(module_of(path))
    if own not in MAY_IMPORT:
        return []
    allowed = MAY_IMPORT[own] | {own}
    ours = [(line, m) for line, m in imports(path, source) if m.split(".")[0] == "stackwise_jax"]
    return [f"{path}:{line}: {own or 'the package'} imports {m}" for line, m in ours if part_of(m) not in allowed]


def strangers(path: str, source: str) -> list[str]:
    """Packages imported outside the part that they belong to."""
    return [
        f"{path}:{line}: {module} belongs in {' and '.join(homes)}"
        for line, module in imports(path, source)
        if (homes := AT_HOME.get(module.split(".")[0])) and not path.startswith(homes)
    ]


def dangers(path: str, source: str) -> list[str]:
    """What runs code out of data: pickle and its kin, eval, exec, np.load(allow_pickle=True)."""
    kin = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    found = [f"{path}:{line}: {module}" for line, module in imports(path, source) if module.split(".")[0] in kin]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            found.append(f"{path}:{node.lineno}: {node.id}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{path}:{node.value.lineno}: allow_pickle")
        elif isinstance(node, ast.Attribute) and node.attr in ("eval", "exec", "read_pickle", "to_pickle"):
            found.append(f"{path}:{node.lineno}: .{node.attr}")
    return found


def placements(path: str, source: str) -> list[str]:
    """`memory_kind` as a name, an attribute, an argument or a string outside memory/; prose may say it."""
    if path.startswith("stackwise_jax/memory/"):
        return []
    words = {ast.Name: "id", ast.Attribute: "attr", ast.keyword: "arg", ast.arg: "arg", ast.Constant: "value"}
    nodes = [node for node in ast.walk(ast.parse(source)) if type(node) in words]
    named = [
        node for node in nodes if str(getattr(node, words[type(node)])).strip("_") in ("memory_kind", "memory_kinds")
    ]
    return [f"{path}:{getattr(node, 'lineno', node)}: memory_kind" for node in named]


def too_long(path: str, source: str) -> list[str]:
    """Files over `MAX_LINES`."""
    n_lines = len(source.splitlines())
    return [f"{path}: {n_lines} lines"] if n_lines > MAX_LINES else []


def undocumented(path: str, source: str) -> list[str]:
    """Modules and public top-level functions and classes without a docstring; an empty file says nothing wrong."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else [f"{path}: the module"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [f"{path}:{node.lineno}: {node.name}"]
    return missing


def loose_defaults(path: str, source: str) -> list[str]:
    """`config.get(key, default)` in any spelling: a default belongs in schema.py."""
    return [
        f"{path}:{node.lineno}: .get on a config"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "get"
        and re.search(r"(^|[._])config$", ast.unparse(node.func.value))
    ]


Checker = Callable[[str, str], list[str]]
CHECKS: dict[str, tuple[Checker, list[str]]] = {
    "imports point one way": (wrong_directions, PACKAGE),
    "packages stay at home": (strangers, PACKAGE),
    "no code out of data": (dangers, PACKAGE + CONFIGS),
    "memory_kind only in memory": (placements, PACKAGE),
    "files stay short": (too_long, PACKAGE + CONFIGS + TESTS),
    "everything public is explained": (undocumented, PACKAGE),
    "no defaults at the place of use": (loose_defaults, PACKAGE + CONFIGS),
}


@pytest.mark.parametrize("rule", CHECKS)
def test_house_rule(rule: str):
    checker, paths = CHECKS[rule]
    assert paths
    complaints = [line for path in paths for line in checker(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (wrong_directions, "stackwise_jax/ops/rope.py", "from stackwise_jax.models.rack import init_rack"),
        (wrong_directions, "stackwise_jax/models/rack.py", "def f():\n    import stackwise_jax.train.step"),
        (wrong_directions, "stackwise_jax/models/rack.py", "from stackwise_jax import train"),
        (wrong_directions, "stackwise_jax/models/rack.py", "from ..train import step"),
        (wrong_directions, "stackwise_jax/train/step.py", "from stackwise_jax.report import train_and_report"),
        (wrong_directions, "stackwise_jax/train/step.py", "from stackwise_jax.evals import loss"),
        (wrong_directions, "stackwise_jax/memory/budget.py", "from stackwise_jax.objectives import masks"),
        (wrong_directions, "stackwise_jax/data/corpus.py", "from stackwise_jax.train.state import TrainState"),
        (wrong_directions, "stackwise_jax/types.py", "from stackwise_jax.ops import mask"),
        (wrong_directions, "stackwise_jax/__init__.py", "from stackwise_jax.config import default"),
        (strangers, "stackwise_jax/train/step.py", "import flax.linen as nn"),
        (strangers, "stackwise_jax/train/step.py", "def f():\n    from orbax import checkpoint"),
        (strangers, "stackwise_jax/schema.py", "from ml_collections import config_dict"),
        (dangers, "stackwise_jax/data/corpus.py", "import pickle"),
        (dangers, "stackwise_jax/data/corpus.py", "from cloudpickle import loads"),
        (dangers, "stackwise_jax/data/corpus.py", "np.load(path, allow_pickle=True)"),
        (dangers, "stackwise_jax/data/corpus.py", "np.load(path, allow_pickle=flag)"),
        (dangers, "stackwise_jax/data/corpus.py", "eval(text)"),
        (dangers, "stackwise_jax/data/corpus.py", "run = exec"),
        (dangers, "stackwise_jax/data/corpus.py", "builtins.eval(text)"),
        (placements, "stackwise_jax/train/step.py", "sharding.with_memory_kind('pinned_host')\nx(memory_kind=None)"),
        (placements, "stackwise_jax/train/step.py", "getattr(x, 'memory_kind')"),
        (too_long, "stackwise_jax/config.py", "x = 1\n" * 401),
        (undocumented, "stackwise_jax/config.py", '"""Said."""\ndef resolve(config): ...'),
        (undocumented, "stackwise_jax/config.py", '"""Said."""\nclass Config: ...'),
        (undocumented, "stackwise_jax/config.py", "x = 1"),
        (loose_defaults, "stackwise_jax/train/step.py", "program.config.get('remat', 'none')"),
    ],
)
def test_house_rules_detect(checker: Checker, path: str, source: str):
    assert checker(path, source)


@pytest.mark.parametrize(
    ("checker", "path", "source"),
    [
        (wrong_directions, "stackwise_jax/models/rack.py", "from stackwise_jax import __version__, schema\nimport jax"),
        (wrong_directions, "stackwise_jax/report.py", "from stackwise_jax.train.loop import train"),
        (strangers, "stackwise_jax/models/rack.py", "import flax.linen as nn"),
        (dangers, "stackwise_jax/data/corpus.py", "np.load(path, allow_pickle=False)\njax.eval_shape(f)"),
        (placements, "stackwise_jax/memory/placement.py", "s.with_memory_kind('device')"),
        (placements, "stackwise_jax/train/step.py", '"""Says that memory_kind is elsewhere."""'),
        (undocumented, "stackwise_jax/config.py", '"""Said."""\ndef _private(): ...'),
        (loose_defaults, "stackwise_jax/train/step.py", "named_leaves(old).get(name, leaf)"),
    ],
)
def test_house_rules_let_pass(checker: Checker, path: str, source: str):
    assert checker(path, source) == []


# --- configs ---

ARGUMENTS = {"configs/gpt2_small.py": ["layerwise", "stackwise", "end_to_end"]}
ARGUMENTS |= {f"configs/{family}.py": list(sizes) for family, sizes in families.SIZES.items()}
ARGUMENTS["configs/attention.py"] = list(runpy.run_path(str(ROOT / "configs/attention.py"))["KINDS"])
ARGUMENTS["configs/comparison.py"] = ["layerwise", "stackwise_2x6_frozen_head", "control_3@2e-3"]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_resolves_and_says_what_it_is(path: str):
    loaded = runpy.run_path(str(ROOT / path))
    for arguments in [[], *([argument] for argument in ARGUMENTS.get(path, []))]:
        config = resolve(loaded["get_config"](*arguments))
        assert config.name.startswith(Path(path).stem)
        assert describe(make_plan(config, None))
    for word in ("Claim: ", "Hardware: ", "Command: ", f"--config={path}"):
        assert word in loaded["__doc__"], f"{path} does not say: {word}"


def test_an_unknown_mode_of_a_config_is_refused():
    get_config = runpy.run_path(str(ROOT / "configs/gpt2_small.py"))["get_config"]
    with pytest.raises(UserError, match='Did you mean "layerwise"'):
        get_config("layerwize")


# --- the README's tree ---

TREE_TITLE = "## The tree"
# Listed as one line: what is inside changes with every run.
LISTED_AS_ONE = ("docs/results/",)
UNLISTED_NAMES = ("__init__.py", "py.typed")


def parse_tree(readme: str) -> dict[str, str]:
    """{path: description} of the fenced block under `TREE_TITLE`.

    One entry a line: two spaces of indentation a level, a name (folders end in a slash), two spaces or more, what
    it is.
    """
    section = readme.partition(f"\n{TREE_TITLE}\n")[2]
    block = re.search(r"^```[a-z]*\n(.*?)^```", section.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
    if block is None:
        raise ValueError(f"no fenced block under {TREE_TITLE!r}")
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        match = re.fullmatch(r"((?:  )*)(\S+) {2,}(\S.*)", line)
        if match is None or len(match[1]) // 2 > len(folders):
            raise ValueError(f"not `name  description` indented by folders: {line!r}")
        folders = folders[: len(match[1]) // 2]
        path = "".join(folders) + match[2]
        if path in entries:
            raise ValueError(f"listed twice: {path}")
        entries[path] = match[3]
        if path.endswith("/"):
            folders.append(match[2])
    return entries


def wanted_in_tree(files: list[str]) -> set[str]:
    """What of the repository's files the tree must list: the package, configs, launch, docs, and the top of tests."""
    wanted = set()
    for file in files:
        folder = next((f for f in LISTED_AS_ONE if file.startswith(f)), None)
        if folder:
            wanted.add(folder)
        elif file.startswith("tests/"):
            wanted.add("/".join(file.split("/")[:2]) + ("/" if file.count("/") > 1 else ""))
        elif file.startswith(("stackwise_jax/", "configs/", "launch/", "docs/")):
            wanted.add(file)
    return {path for path in wanted if path.rpartition("/")[2] not in UNLISTED_NAMES}


def tree_complaints(readme: str, files: list[str]) -> list[str]:
    listed = set(parse_tree(readme))
    folders = {"/".join(file.split("/")[:n]) + "/" for file in files for n in range(1, file.count("/") + 1)}
    missing = [f"{path} is not in the README's tree" for path in sorted(wanted_in_tree(files) - listed)]
    return missing + [f"{path} does not exist" for path in sorted(listed - folders - set(files))]


def repository_files() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [file for file in done.stdout.splitlines() if (ROOT / file).exists()]


def test_readme_lists_every_file_and_nothing_else():
    complaints = tree_complaints((ROOT / "README.md").read_text(encoding="utf-8"), repository_files())
    assert not complaints, "\n".join(complaints)


SMALL_TREE = """# Title

## The tree

```
stackwise_jax/    the package
  main.py         flags, then config, then run
  ops/            arrays in, arrays out
    rope.py       rotary positions
tests/            laws
  laws/           of the method
docs/results/     numbers
```

## After
"""
SMALL_FILES = ["stackwise_jax/main.py", "stackwise_jax/ops/rope.py", "stackwise_jax/ops/__init__.py"]
SMALL_FILES += ["tests/laws/test_scan.py", "docs/results/a.json", "README.md"]


def test_readme_tree_of_a_small_repository():
    assert tree_complaints(SMALL_TREE, SMALL_FILES) == []
    assert parse_tree(SMALL_TREE)["stackwise_jax/ops/rope.py"] == "rotary positions"


def test_readme_tree_detects_missing_and_stale_files():
    assert tree_complaints(SMALL_TREE, [*SMALL_FILES, "stackwise_jax/ops/mask.py"]) == [
        "stackwise_jax/ops/mask.py is not in the README's tree"
    ]
    assert tree_complaints(SMALL_TREE, [*SMALL_FILES, "tests/models/test_x.py"])
    stale = [file for file in SMALL_FILES if not file.endswith("rope.py")]
    assert "stackwise_jax/ops/rope.py does not exist" in tree_complaints(SMALL_TREE, stale)


@pytest.mark.parametrize(
    "change",
    [
        ("## The tree", "## Tree"),
        ("main.py         flags", "main.py flags"),
        ("    rope", "      rope"),
        ("main", "ops/ x"),
    ],
)
def test_readme_trees_that_cannot_be_read_are_refused(change: Any):
    with pytest.raises(ValueError, match=r"fenced|indented|twice"):
        parse_tree(SMALL_TREE.replace(*change))


# --- names ---


def global_names(code: types.CodeType) -> set[str]:
    """The names that a module's code, and all code inside it, reads from the module or the builtins."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    reads = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return reads.union(*(global_names(part) for part in inner))


def undefined(source: str, path: str) -> set[str]:
    """Names that a module reads and nothing in it ever binds; linters cannot say, because shapes look like names."""
    tree = ast.parse(source)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    named = ast.FunctionDef | ast.ClassDef | ast.ExceptHandler
    bound |= {node.name or "" for node in ast.walk(tree) if isinstance(node, named)}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    bound |= {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    known = (
        bound
        | set(dir(builtins))
        | {"__file__", "__name__", "__doc__", "__annotations__", "__qualname__", "__module__"}
    )
    return global_names(compile(source, path, "exec")) - known


def test_every_name_is_defined() -> None:
    found = {path: undefined((ROOT / path).read_text(encoding="utf-8"), path) for path in PACKAGE + CONFIGS}
    assert {path: names for path, names in found.items() if names} == {}


def test_an_undefined_name_is_found() -> None:
    assert undefined("import math\ndef f(x):\n    return math.pi + placment.y + len(x)\n", "m.py") == {"placment"}

"""A digest of what the code of a stage does, so that an edit re-runs only the stages whose result it can change.

The digest is of the syntax trees of the functions, classes and constants that a stage can reach. The search starts at
the stage's file in `stages/` and at the classes of the parameter sections that it reads. The digest leaves out what
does not act: comments, formatting, docstrings, annotations of functions, and messages (printed texts, arguments of
raised errors). It also leaves out the modules in `NOT_DIGESTED`, which start, show, check or record a stage.

The analysis is by name and errs on the safe side: a name that a definition mentions counts as used. It imports no
module that it reads.
"""

import ast
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lgp.workflow.pipeline import SECTIONS
from lgp.workflow.source_tree import PACKAGE, source_root

NOT_DIGESTED = (
    "lgp.compute.interruption",
    "lgp.compute.launch",
    "lgp.compute.machines",
    "lgp.errors",
    "lgp.evaluate.online_ridge",
    "lgp.features.online_knn",
    "lgp.params.file",
    "lgp.pretrain.batch_checks",
    "lgp.training.progress",
    "lgp.training.replay",
    "lgp.workflow.ahead",
    "lgp.workflow.code_digest",
    "lgp.workflow.mlflow_store",
    "lgp.workflow.moved_store",
    "lgp.workflow.origins",
    "lgp.workflow.pipeline",
    "lgp.workflow.provenance",
    "lgp.workflow.registered_encoder",
    "lgp.workflow.restored",
    "lgp.workflow.stage",
    "lgp.workflow.tracking",
    "stages.options",
    "stages.replaying",
    "stages.together",
)
PARAMS_CLASS = ("lgp.params.file", "Params")  # the class whose fields are the sections
WHOLE = "*"  # in place of a name: everything in a module
SILENT = ("ctx", "type_comment", "kind", "lineno", "col_offset", "end_lineno", "end_col_offset")
CACHED_DIGESTS = Path(".lgp") / "code.json"
DIGEST_FORMAT = 1  # version of the digest: raise it when the computation changes

Target = tuple[str, str]  # module and name


@dataclass
class Definition:
    """A top-level name of a module: what it does, and which names it mentions."""

    acts: str = ""
    names: set[str] = field(default_factory=set)
    attributes: dict[str, set[str]] = field(default_factory=dict)  # name → its attributes, where only these are used
    imports: dict[str, Target] = field(default_factory=dict)  # imports inside the definition


class Module:
    """A source file, cut into its top-level definitions."""

    def __init__(self, path: Path) -> None:
        """Parse the file."""
        self.definitions: dict[str, Definition] = {}
        self.imports: dict[str, Target] = {}
        self.always = Definition()  # statements that run with any import of the module
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                self.imports |= _imported(statement)
            elif not _is_type_checking(statement) and not _is_docstring(statement):
                self._add(statement)

    def _add(self, statement: ast.stmt) -> None:
        found = _Reader().read(statement)
        names = _bound(statement)
        for definition in [self.definitions.setdefault(name, Definition()) for name in names] or [self.always]:
            definition.acts += found.acts
            definition.names |= found.names
            definition.imports |= found.imports
            for name, attributes in found.attributes.items():
                definition.attributes.setdefault(name, set()).update(attributes)


class _Reader(ast.NodeVisitor):
    """Reads what a statement does, as text, with the names that it mentions."""

    def read(self, statement: ast.stmt) -> Definition:
        self.found = Definition()
        acting = _strip(statement)
        self.found.acts = json.dumps(_plain(acting))
        self.visit(acting)
        return self.found

    def visit_Name(self, node: ast.Name) -> None:
        self.found.names.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self.found.attributes.setdefault(node.value.id, set()).add(node.attr)
        else:
            self.visit(node.value)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.imports |= _imported(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.imports |= _imported(node)


def _imported(node: ast.stmt) -> dict[str, Target]:
    if isinstance(node, ast.Import):
        return {
            (a.asname or a.name.split(".")[0]): (a.name if a.asname else a.name.split(".")[0], WHOLE)
            for a in node.names
        }
    assert isinstance(node, ast.ImportFrom)
    return {(a.asname or a.name): (node.module or "", a.name) for a in node.names}


def _bound(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines; an empty list where it defines none."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_type_checking(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING"
    )


class _Stripper(ast.NodeTransformer):
    """Removes what does not act."""

    keep_annotations = False  # of fields: pydantic uses them, dataclasses and functions do not

    def generic_visit(self, node: ast.AST) -> ast.AST:
        visited = super().generic_visit(node)
        if getattr(visited, "body", None) == []:  # it only printed
            visited.body = [ast.Pass()]  # type: ignore[attr-defined]
        return visited

    def _block(self, node: Any) -> Any:
        body = node.body
        node.body = (body[1:] if _is_docstring(body[0]) else body) or [ast.Pass()]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        arguments = node.args
        for argument in [
            *arguments.posonlyargs,
            *arguments.args,
            *arguments.kwonlyargs,
            arguments.vararg,
            arguments.kwarg,
        ]:
            if argument:
                argument.annotation = None
        node.returns = None
        kept, self.keep_annotations = self.keep_annotations, False
        self.generic_visit(self._block(node))
        self.keep_annotations = kept
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        is_record = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list) or any(
            ast.unparse(base) == "NamedTuple" for base in node.bases
        )
        kept, self.keep_annotations = self.keep_annotations, not is_record
        self.generic_visit(self._block(node))
        self.keep_annotations = kept
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if not self.keep_annotations:
            node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(raised, None)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        call = node.value
        printed = isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print"
        return None if printed else self.generic_visit(node)


def _strip(statement: ast.stmt) -> ast.AST:
    stripped: ast.AST = _Stripper().visit(statement)
    return stripped


def _plain(node: Any) -> Any:
    """Turn a tree into lists. Absent fields are left out, so that all versions of Python give the same lists."""
    if isinstance(node, ast.AST):
        fields = [(n, v) for n, v in ast.iter_fields(node) if n not in SILENT and v is not None and v != []]
        return [type(node).__name__, *([name, _plain(value)] for name, value in fields)]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return node if isinstance(node, str | int | float | bool) else repr(node)


class Code:
    """The source of a checkout or an installed package."""

    def __init__(self, package: Path = PACKAGE, root: Path | None = None) -> None:
        """Read `lgp` from `package`, and `stages` from `root`."""
        self.package, self.root = package, root or source_root()
        self._modules: dict[str, Module | None] = {}

    @cached_property
    def files(self) -> list[Path]:
        """All source files, sorted."""
        return sorted([*self.package.rglob("*.py"), *(self.root / "stages").glob("*.py")])

    def module(self, name: str) -> Module | None:
        """Return a module of the project by its dotted name; None for a package and for any other module."""
        if name not in self._modules:
            top, _, rest = name.partition(".")
            path = {"lgp": self.package, "stages": self.root / "stages"}.get(top, Path("/nowhere"))
            file = path.joinpath(*rest.split(".")).with_suffix(".py") if rest else path
            self._modules[name] = Module(file) if file.is_file() else None
        return self._modules[name]

    def digest(self, stage: str) -> str:
        """Return the digest of what the code of a stage does."""
        whole = hashlib.sha256(f"{DIGEST_FORMAT}".encode())
        for (module, name), acts in sorted(self.reach(stage).items()):
            whole.update(f"{module}:{name} {acts}\n".encode())
        return whole.hexdigest()

    def reach(self, stage: str) -> dict[Target, str]:
        """Return what a stage can reach: (module, name) → what it does; imports of other packages by name only."""
        found: dict[Target, str] = {}
        pending: list[Target] = [(f"stages.{stage}", WHOLE), *self._sections(stage)]
        while pending:
            target = pending.pop()
            module = self.module(target[0])
            if target in found or target[0] in NOT_DIGESTED:
                continue
            if module is None:
                found[target] = ""
                continue
            found[target] = ""
            of_target = module.definitions.values() if target[1] == WHOLE else [module.definitions.get(target[1])]
            for definition in [module.always, *of_target]:
                if definition is not None:
                    found[target] += definition.acts
                    pending += self._mentioned(target[0], module, definition)
        return found

    def _mentioned(self, name: str, module: Module, definition: Definition) -> Iterator[Target]:
        """Resolve the names that a definition mentions to definitions of this or another module."""
        imports = module.imports | definition.imports
        for mentioned in definition.names | definition.attributes.keys():
            if mentioned in module.definitions:
                yield name, mentioned
            elif mentioned in imports:
                source, imported = imports[mentioned]
                inner = f"{source}.{imported}" if imported != WHOLE else source
                if self.module(inner) is None:
                    yield source, imported
                elif mentioned in definition.names:
                    yield inner, WHOLE
                else:
                    yield from ((inner, attribute) for attribute in definition.attributes[mentioned])

    def _sections(self, stage: str) -> Iterable[Target]:
        """Return the classes of the sections that a stage reads, from the annotations of `Params`."""
        source = self.module(PARAMS_CLASS[0])
        assert source is not None
        (params,) = (s for s in source.tree.body if isinstance(s, ast.ClassDef) and s.name == PARAMS_CLASS[1])
        read = {section.partition(".")[0] for section in SECTIONS[stage]}
        for line in params.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id in read:
                for node in ast.walk(line.annotation):
                    if isinstance(node, ast.Name) and node.id in source.imports:
                        yield source.imports[node.id]


def code_digests(root: Path) -> dict[str, str]:
    """Return the digest of what the code of every stage does now.

    They are kept in `root`/.lgp, and read from there while no source file has another path, size or time of change.

    Args:
        root: of the project.
    """
    code, cache = Code(), root / CACHED_DIGESTS
    state = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in code.files]
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["state"] == state:
            return dict(kept["digests"])
    except (OSError, ValueError, KeyError):
        pass
    digests = {stage: code.digest(stage) for stage in SECTIONS}
    cache.parent.mkdir(parents=True, exist_ok=True)
    # stages that run at the same time write the same; a reader never sees half a file
    written = cache.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps({"state": state, "digests": digests}), encoding="utf-8")
    written.replace(cache)
    return digests

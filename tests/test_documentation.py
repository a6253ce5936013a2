"""The documentation says what the code does: examples run, tables are complete, nothing is listed twice."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

import gateway
from gateway import errors
from gateway.config.load import load_config
from gateway.config.schema import Config
from gateway.edge.extension import CapReport, Report

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("[a-z]*.md"))]
RECORDS = sorted((ROOT / "docs/adr").glob("0*.md"))
API = (ROOT / "docs/api.md").read_text()
CONFIG = (ROOT / "docs/config.md").read_text()
SAID_BY_INSTANCE = {"UpstreamRejected": "the backend's"}


def make_targets():
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(language):
    """Every fenced block of `language`, as (page, text)."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.relative_to(ROOT).as_posix(), text) for page in PAGES for text in pattern.findall(page.read_text())]


def error_classes():
    """Every class of the error tree, wherever in the gateway it is defined."""
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        importlib.import_module(module.name)
    found, todo = [], [errors.GatewayError]
    while todo:
        found.append(todo.pop())
        todo.extend(found[-1].__subclasses__())
    return found


def error_rows():
    """The rows of the error table, as class name to (status, type, code) of its first row."""
    row = re.compile(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", re.MULTILINE)
    return {name: (status, kind, code) for name, status, kind, code in row.findall(API)}


def sections_of(model, path=""):
    """Every field of a configuration model, as (top key, field name)."""
    for name, info in model.model_fields.items():
        top = path or name
        if path:
            yield top, name
        for inner in _models_in(info.annotation):
            yield from sections_of(inner, top)


def _models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def test_readme_shows_the_two_commands_on_its_first_screen():
    """`make serve` and `make test` stand in the first 45 lines, with an SDK example between them."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:45])
    assert screen.index("make serve") < screen.index("from openai import OpenAI") < screen.index("make test")


def test_every_make_command_that_is_named_exists():
    """Each `make X` in the README, CONTRIBUTING and the pages is a target of the Makefile."""
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    named = {name for page in pages for name in re.findall(r"(?:^|[`\s])make ([a-z][a-z0-9-]*)", page.read_text())}
    assert {"serve", "test", "check", "bench"} <= named <= make_targets()


@pytest.mark.parametrize(("page", "text"), blocks("yaml"))
def test_every_configuration_example_is_one_the_gateway_accepts(page, text, tmp_path):
    """A YAML example that has `models` validates as it stands; one without validates beside a model."""
    path = tmp_path / "thinkgate.yaml"
    model = 'models: {qwen3: {backends: [{id: a, url: "http://127.0.0.1:8000"}]}}\n'
    path.write_text(text if re.search(r"^models:", text, re.MULTILINE) else model + text)
    assert load_config(path, env={}).models


@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_every_python_example_is_python(page, text):
    """A Python example parses and imports only the OpenAI SDK."""
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= {"openai"}


def test_every_configuration_key_is_documented():
    """Each key of the configuration stands in the section of docs/config.md that it belongs to."""
    parts = re.split(r"^## ", CONFIG, flags=re.MULTILINE)[1:]
    text_of = {key: part for part in parts for key in re.findall(r"`(\w+)`", part.splitlines()[0])}
    assert set(text_of) == set(Config.model_fields)
    missing = [
        f"{top}: {name}"
        for top, name in sections_of(Config)
        if top not in {"search", "agentic", "store"} and not re.search(rf"`(?:\w+\.)?{name}[`.]", text_of[top])
    ]
    assert missing == []


def test_every_field_of_the_extension_is_documented():
    """Each field of the `thinkgate` object, and of its cap, has a row in docs/api.md."""
    section = API[API.index("### The `thinkgate` extension") : API.index("### Headers")]
    fields = [*Report.__struct_fields__, *(f"cap.{name}" for name in CapReport.__struct_fields__)]
    assert [name for name in fields if f"`{name}`" not in section and name != "cap"] == []


def test_every_metric_is_documented():
    """Each metric that gateway/metrics.py names stands in the table of the operations guide."""
    named = set(re.findall(r'"(thinkgate_[a-z_]+)"', (ROOT / "gateway/metrics.py").read_text()))
    documented = set(re.findall(r"`(thinkgate_[a-z_]+)`", (ROOT / "docs/guides/operations.md").read_text()))
    assert named
    assert named == documented


def test_every_decision_record_is_listed():
    """The index lists each record once, numbered without a gap, and each has the four parts."""
    listed = re.findall(r"^(0\d{3}-[a-z0-9-]+)$", (ROOT / "docs/adr/index.md").read_text(), re.MULTILINE)
    assert listed == [path.stem for path in RECORDS]
    assert [int(name[:4]) for name in listed] == list(range(1, len(listed) + 1))
    for path in RECORDS:
        headings = re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)
        assert headings == ["Context", "Decision", "Consequences"]
        assert re.search(r"^Status: (accepted|superseded by \d{4})$", path.read_text(), re.MULTILINE)


def test_changelog_has_an_unreleased_part():
    """CHANGELOG.md begins with what is not released yet."""
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_only_the_error_module_knows_a_status():
    """An error class outside gateway/errors.py refines a documented one and sets no status, type or code."""
    outside = [cls for cls in error_classes() if cls.__module__ != "gateway.errors"]
    assert [cls for cls in outside if vars(cls).keys() & {"status", "type", "default_code"}] == []


def test_every_error_has_its_own_documented_row():
    """Each class of gateway/errors.py has a row with its status, type and code, distinct from the others."""
    classes = {cls.__name__: cls for cls in error_classes() if cls.__module__ == "gateway.errors"}
    rows = error_rows()
    assert set(classes) == set(rows)
    assert len(set(rows.values())) == len(rows)
    for name, cls in classes.items():
        if name in SAID_BY_INSTANCE:
            assert all(SAID_BY_INSTANCE[name] in cell for cell in rows[name])
            continue
        status, kind, code = rows[name]
        assert int(status) == cls.status
        if name != "LimitExceeded":
            assert kind == f"`{cls.type}`"
            assert code.startswith(f"`{cls.default_code}`" if cls.default_code else "")


def test_limit_errors_have_a_row_per_kind():
    """A rate, a held budget and a spent one are told apart as the table says."""
    for kind in ("rate", "budget_held", "budget_spent"):
        fields = errors.LimitExceeded("no", kind=kind, retry_after_s=1.0).fields()
        assert f"| 429 | `{fields['type']}` | `{fields['code']}` |" in API


def test_error_tree_is_drawn_as_it_is():
    """The tree at the top of gateway/errors.py shows every class once."""
    drawn = re.findall(r"^(?:.*[├└]── | {4})(\w+)(?: {2,}.*)?$", errors.__doc__ or "", re.MULTILINE)
    classes = [cls.__name__ for cls in error_classes() if cls.__module__ == "gateway.errors"]
    assert sorted(drawn) == sorted(classes)


def test_errors_tell_the_sdk_whether_to_retry():
    """What the OpenAI SDK would retry by status alone is retried only if the class says a retry may help."""
    for cls in error_classes():
        if cls.__module__ != "gateway.errors" or cls.__init__ is not errors.GatewayError.__init__:
            continue
        headers = dict(cls("no").headers())
        sdk_retries = cls.status in {408, 409, 429} or cls.status >= 500
        assert (b"x-should-retry" in headers) == (sdk_retries and not cls.is_retryable)

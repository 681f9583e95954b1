"""What the site needs beyond mkdocs: fences marked for the tests, and links for the Sphinx roles of docstrings."""

import re

import griffe

_ROLE = re.compile(r":(?:class|data|func|meth|attr|mod):`(~?)([\w.]+)`")
_PACKAGE = "pylo_integrations"


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """mkdocs hook: the mark that tests/tools/test_docs.py reads would break the fence."""
    return markdown.replace("```python no-run", "```python")


class Roles(griffe.Extension):
    """mkdocstrings extension: makes :func:`name` a link when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called by griffe for everything that it reads."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda role: _link(role, obj), obj.docstring.value)


def _link(role: re.Match[str], obj: griffe.Object) -> str:
    shortened, name = role.groups()
    text = name.rpartition(".")[2] if shortened else name
    if not name.startswith(_PACKAGE):
        owner = obj if obj.is_module or obj.is_class else obj.parent
        candidates = [owner, *_parents(owner)]
        first, dot, rest = name.partition(".")
        scope = next((scope for scope in candidates if first in scope.members), obj.module)
        known = scope.members.get(first)
        # What a module has imported is known by where it was defined.
        path = known.target_path if known is not None and known.is_alias else f"{scope.path}.{first}"
        name = f"{path}{dot}{rest}"
    # Optional: a link only where the API page shows the target.
    return f'<autoref identifier="{name}" optional><code>{text}</code></autoref>'


def _parents(scope: griffe.Object) -> list[griffe.Object]:
    return [] if scope.parent is None else [scope.parent, *_parents(scope.parent)]

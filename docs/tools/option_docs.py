"""An extension of griffe: the reference shows an option's help and default, as ``arguments.py`` writes them."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class OptionDocs(griffe.Extension):
    """Turns ``rank: int = _option(2, "rank r of each LoRA", group=LORA)`` into an attribute with a docstring."""

    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        """Read the call, before the parameters of the data class are made of the attributes."""
        call = node.value if isinstance(node, ast.AnnAssign) else None
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_option"):
            return
        assert isinstance(attr.value, griffe.ExprCall)
        attr.value = attr.value.arguments[0]
        attr.docstring = griffe.Docstring(_sentence(call.args[1]), parent=attr, parser="google")


def _sentence(text: ast.expr) -> str:
    """The help text as a sentence; a constant that stands in it is shown by its name."""
    words = "".join(
        str(part.value) if isinstance(part, ast.Constant) else f"`{ast.unparse(part.value)}`"
        for part in (text.values if isinstance(text, ast.JoinedStr) else [text])
        if isinstance(part, ast.Constant | ast.FormattedValue)
    )
    return f"{words[0].upper()}{words[1:]}."

"""NiiVue, the viewer of volumes that runs in a browser, as the extra `viewer` brings it."""

import functools
import importlib.util
import re
from pathlib import Path
from urllib.parse import unquote

from bhsd_jax.platform.errors import UserError, explain_extra

_WIDGET = Path("static") / "widget.js"
_BUNDLE = re.compile(r'"((?:[\w.!~*\'()-]|%[0-9A-F]{2}){1000000,})"')
_EXPORTS = re.compile(r"export\{[^{}]*\bNiivue\b[^{}]*\};?\s*$")


def available() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("ipyniivue") is not None


@functools.cache
def module() -> str:
    """NiiVue's JavaScript module for a page, with its names in scope and nothing exported.

    ipyniivue's widget carries it, percent-encoded, for the pages that it saves.

    Raises:
        ValueError: If the extra is not installed, or holds no such module.

    Source: ipyniivue 2.4.4 (BSD-2-Clause), which carries NiiVue 0.65.0 (BSD-2-Clause).
    """
    spec = importlib.util.find_spec("ipyniivue")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UserError(f"the viewer needs NiiVue; {explain_extra('viewer')}")
    path = Path(folders[0]) / _WIDGET
    found = _BUNDLE.search(path.read_text()) if path.is_file() else None
    text = unquote(found[1]) if found else ""
    ends = ("</script", "<!--")  # what would end a script of a page, or hide its end
    if not _EXPORTS.search(text) or any(end in text.lower() for end in ends):
        raise UserError(
            f"{path}: holds no NiiVue that a page can use; ipyniivue 2.4.4 does: "
            f"{explain_extra('viewer')}"
        )
    return _EXPORTS.sub("", text)

"""The directive that puts a table of settings into a page."""

from __future__ import annotations

import inspect

from docutils import nodes
from settings_table import find, summary, table
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class SettingsDirective(SphinxDirective):
    """``{settings} IMPORT.PATH [PREFIX]``: summary and table of a class or function."""

    required_arguments = 1
    optional_arguments = 1
    has_content = False

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        path, *prefix = self.arguments
        is_class_or_command = "parser" not in inspect.signature(find(path)).parameters
        about = f"{summary(path)}\n\n`{path}`\n\n" if is_class_or_command else ""
        text = f"{about}{table(path, *prefix)}\n"
        self.env.note_dependency(inspect.getfile(find(path)))
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("settings", SettingsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""From the plan to text: expressions in a dialect, the context of the templates, the module."""

"""The mount (one per client host) and the ``dfs`` command. See docs/design.md sections 7 to 10."""

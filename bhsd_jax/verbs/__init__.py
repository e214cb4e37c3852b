"""The commands: the only code that sees a config or the paths of a run."""

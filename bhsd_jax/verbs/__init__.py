"""The commands, one file each; with assemble/ the only code that sees a config."""

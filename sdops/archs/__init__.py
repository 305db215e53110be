"""SHELF: model families as data. One TOML file is one family."""

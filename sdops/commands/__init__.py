"""SHELF: the command line. One file is one command: parse, call the verb of the same name, show its report."""

"""SHELF: the command line. One file is one command: parse, call the verb, show its report."""

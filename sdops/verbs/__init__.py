"""The public operations. A command of the same name parses and shows; the work happens here."""

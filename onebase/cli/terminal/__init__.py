"""The output of the commands: tables, bars, lines."""

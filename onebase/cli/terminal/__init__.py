"""What the commands show: tables, bars, lines."""

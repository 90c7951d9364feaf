"""The methods as they are trained: one file each; `attach` knows them by name."""

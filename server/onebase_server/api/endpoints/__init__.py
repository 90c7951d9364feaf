"""The endpoints, one file for each topic: routes, and what is particular to them."""

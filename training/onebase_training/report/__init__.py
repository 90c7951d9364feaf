"""How a run is shown: in the terminal, on a page, to tensorboard."""

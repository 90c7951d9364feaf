"""From a checked body to what the engine is asked, and from its outputs to an answer."""

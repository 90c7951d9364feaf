"""What the tests of the adapters and of the engine share."""

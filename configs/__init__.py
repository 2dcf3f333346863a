"""Ready configurations, found by name on the command line."""

"""Product of a few rows with a large weight."""

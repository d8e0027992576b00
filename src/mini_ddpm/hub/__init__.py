"""Open, describe and publish pipelines."""

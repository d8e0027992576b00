"""Opening, describing and publishing pipelines."""

"""Stage 1: text to ids (`recipe`), ids to packed rows (`rows`), rows to scores (scorers)."""

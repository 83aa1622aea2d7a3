"""Files in and out: candidate lists in Parquet, foreign formats, durable writes."""

"""The main job: plan → shards → blocks → rankings (→ parts → windows → rankings) → files."""

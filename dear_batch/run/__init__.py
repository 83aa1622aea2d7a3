"""The main job: plan → shards → blocks → rankings → published files. Knows devices and disks."""

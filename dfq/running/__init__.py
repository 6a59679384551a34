"""How a run runs: its loop, its folder, its checkpoints, its device."""

"""The paper: generators, losses, the teacher, the alternating loop."""

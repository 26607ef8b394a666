"""What users bring: their code, found by its path, and pictures of their objects."""

"""What both examples show is tested here; that they show it, by each."""

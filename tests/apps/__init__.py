"""Small apps for tests, served in this process or by real servers."""

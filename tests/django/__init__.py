"""Tests of the Django integration; `project` is the Django project that they run in."""

"""Runnable apps that show how the package is used; copy from them."""

"""`manage.py dispytch`."""

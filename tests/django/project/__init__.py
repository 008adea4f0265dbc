"""A small Django project: one app, databases and a broker from the environment."""

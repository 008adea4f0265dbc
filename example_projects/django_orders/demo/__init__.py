"""What `make demo-django` runs: a broker, the project, a Celery worker, a first visitor. Not needed in yours."""

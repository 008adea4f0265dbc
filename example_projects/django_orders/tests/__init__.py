"""How a project that emits events is tested: without a broker, in Django's and in pytest's way.

python -m pytest example_projects/django_orders --ds=example_projects.django_orders.shop.settings
"""

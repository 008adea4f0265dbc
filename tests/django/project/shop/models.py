"""What the shop keeps."""

from __future__ import annotations

from django.db import models


class Tag(models.Model):
    name = models.CharField(max_length=50)


class Order(models.Model):
    customer = models.CharField(max_length=100)
    tags = models.ManyToManyField(Tag)


class ArchivedOrder(models.Model):
    customer = models.CharField(max_length=100)


class Failure(models.Model):
    """What a receiver of event_failed writes down."""

    event_type = models.CharField(max_length=200)
    error = models.CharField(max_length=500)

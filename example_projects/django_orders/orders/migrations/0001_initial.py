"""Orders, their cancellations, and events that failed."""

import django.core.validators
import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    """Made by `manage.py makemigrations`, for Django 5.2."""

    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="FailedEvent",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("event_id", models.CharField(max_length=64)),
                ("type", models.CharField(max_length=200)),
                ("body", models.TextField()),
                ("error", models.TextField()),
                ("failed_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "ordering": ("-pk",),
            },
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("customer", models.CharField(max_length=60)),
                (
                    "product",
                    models.CharField(
                        choices=[
                            ("Espresso beans", "Espresso beans"),
                            ("Pour-over kettle", "Pour-over kettle"),
                            ("Stoneware mug", "Stoneware mug"),
                            ("Paper filters", "Paper filters"),
                        ],
                        max_length=40,
                    ),
                ),
                (
                    "quantity",
                    models.PositiveSmallIntegerField(
                        default=1,
                        validators=[
                            django.core.validators.MinValueValidator(1),
                            django.core.validators.MaxValueValidator(99),
                        ],
                    ),
                ),
                ("total", models.DecimalField(decimal_places=2, editable=False, max_digits=8)),
                ("placed_at", models.DateTimeField(auto_now_add=True)),
                ("packed_at", models.DateTimeField(editable=False, null=True)),
            ],
            options={
                "ordering": ("-pk",),
            },
        ),
        migrations.CreateModel(
            name="Cancellation",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("reason", models.CharField(default="changed my mind", max_length=60)),
                ("cancelled_at", models.DateTimeField(auto_now_add=True)),
                (
                    "order",
                    models.OneToOneField(
                        on_delete=django.db.models.deletion.CASCADE, related_name="cancellation", to="orders.order"
                    ),
                ),
            ],
        ),
    ]

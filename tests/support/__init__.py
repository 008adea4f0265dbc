"""What tests share: brokers of our own, and a proxy that breaks connections."""

"""The live page's other half: a consumer per broker, and the feed that hands what it receives to open pages."""

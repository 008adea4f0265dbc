"""The live page: a consumer per broker, the feed that hands what it receives to open pages, and the page itself."""

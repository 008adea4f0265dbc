"""The page that shows events as they come back from the broker. Nothing here is needed in a project of yours."""

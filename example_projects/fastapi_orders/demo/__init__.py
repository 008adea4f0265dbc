"""What `make demo` runs: a broker, the app, and a first visitor. Nothing here is needed in an app of yours."""

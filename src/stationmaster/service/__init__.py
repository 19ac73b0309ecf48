"""The service around the library: configuration, command line, signals, logs, and the demo's processes."""
